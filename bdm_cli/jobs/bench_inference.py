"""`bdm bench inference`: packed layers and a whole packed step beside fp32 and int8 of others, on this machine.

The twin of BinaryDM's Table 16. Everything is timed from fp32 input to fp32 output: quantizing, packing, padding and
rescaling included. Contenders take turns, in which each first runs untimed. Of fp32 the fastest counts: PyTorch in both
memory formats, and ONNX Runtime if it is installed.
"""

import importlib.util
import itertools
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from bdm_cli import measure, output, records, runs, student
from bdm_cli import recipe as recipes
from bdm_cli.diffusion.models import build_unet, estimate_noise
from bdm_cli.metrics import cost
from bdm_cli.packed import ops, pack
from bdm_cli.recipe import Recipe

NETWORK = "bedrooms-w1a4"
"""LDM-4, the network of Table 16; its other bits are `method.activation_bits`."""

WARM_S, TIMED_S = 0.03, 0.06
"""Length of a turn's two parts, of at least one call each: untimed, until caches are a contender's own and the threads
of the last one have stopped waiting for work; then timed."""

STEPS = 3
"""Steps that are taken apart by operator."""

MEAN = "geometric mean"
PAPER_BITS = 4
SPEEDUPS = {1: NETWORK, 2: f"{NETWORK}-highorder"}
"""Rows of Table 16 whose speed-up a benchmark of MAIN measures, by the number of bases."""

HELD_BACK = ("BDM_KERNEL", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""Environment variables that hold one side to an older instruction set."""

FULL = ("PyTorch", "PyTorch, channels last", "ONNX Runtime")
INT8 = "ONNX Runtime int8"


class Conv(NamedTuple):
    """A convolution of `channels` x side x side numbers, with as many zeros around as keep the side at stride 1."""

    channels: int
    outputs: int
    kernel: int
    side: int
    stride: int = 1

    def __str__(self) -> str:
        by = f" / {self.stride}" if self.stride > 1 else ""
        return f"{self.channels} to {self.outputs}, {self.kernel}x{self.kernel}{by} at {self.side}"

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def macs(self) -> int:
        side = self.side // self.stride
        return side * side * self.channels * self.outputs * self.kernel**2


MAIN = (
    Conv(224, 224, 3, 64),
    Conv(448, 448, 3, 32),
    Conv(672, 672, 3, 16),
    Conv(896, 896, 3, 8),
    Conv(672, 448, 1, 32),
)
"""The shapes that most of LDM-4's time goes to: one per resolution, and a 1x1."""

Contender = Callable[[], object]


# ---- single layers -------------------------------------------------------------------------------------------------


def layers(
    bits: Sequence[int],
    shapes: Sequence[Conv],
    rounds: int,
    threads: int | None,
    bases: Sequence[int] = (1,),
    onnx: bool = True,
) -> pd.DataFrame:
    """One row per shape, activation bits and number of bases, then their geometric means over the shapes.

    Each row also goes to results/bench/inference.jsonl, with its provenance; the means of MAIN to the report, if both
    sides take all that the machine has. threads: None = torch's own number.
    onnx: ONNX Runtime beside PyTorch, if it is installed; it cannot be held to an older instruction set.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    ops.keep_memory()  # for all contenders
    try:
        with output.progress("layers", len(shapes) * rounds, "rounds") as advance, torch.inference_mode():
            rows = [row for shape in shapes for row in _layer(shape, bits, bases, rounds, onnx, advance)]
    finally:
        torch.set_num_threads(before)
    for kind in dict.fromkeys((row["bits"], row["bases"]) for row in rows):
        same = [row for row in rows if (row["bits"], row["bases"]) == kind]
        means = {key: _geometric([row[key] for row in same]) for key in ("last_ratio", "first_ratio", "int8_ratio")}
        told = {key: same[0][key] for key in ("bits", "bases", "path", "threads", "rounds", "cpu", "torch_uses")}
        rows.append({"shape": f"{MEAN} of {len(same)}"} | told | means)
    freely = threads is None and onnx and not any(map(os.environ.get, HELD_BACK))
    for row in rows:
        _append({"task": "layer"} | row)
        mean = tuple(shapes) == MAIN and row["shape"].startswith(MEAN) and row["bits"] == PAPER_BITS
        if mean and freely:
            _record(SPEEDUPS[row["bases"]], row["last_ratio"])
    table = pd.DataFrame(rows)
    names = {
        "shape": "Layer",
        "bits": "W/A",
        "last_ms": "NHWC, ms",
        "first_ms": "NCHW, ms",
        "full_ms": "fp32, ms",
        "last_ratio": "NHWC: x fp32",
        "last_spread": "10-90 %",
        "first_ratio": "NCHW: x fp32",
        "int8_ratio": "NHWC: x int8",
        "full": "fp32 by",
    }
    table["bits"] = [
        f"{'1' if bases == 1 else f'{bases}x1'}/{a}" for a, bases in zip(table.bits, table.bases, strict=True)
    ]
    return table.reindex(columns=list(names)).rename(columns=names)


def _layer(
    shape: Conv, bits: Sequence[int], bases: Sequence[int], rounds: int, onnx: bool, advance: Callable[[int], None]
) -> list[dict[str, object]]:
    contenders = _full_precision(shape, onnx)
    ours = list(itertools.product(bits, bases, ("last", "first")))
    contenders |= {f"{a} {base} {layout}": _packed(shape, a, base, layout) for a, base, layout in ours}
    times = _in_turn(contenders, rounds, advance)
    middle = {name: statistics.median(found) * 1e3 for name, found in times.items()}
    full = min((name for name in FULL if name in times), key=middle.get)
    rows = []
    for a, base in itertools.product(bits, bases):
        row: dict[str, object] = {"shape": str(shape), "bits": a, "bases": base, "path": ops.path()}
        row |= {"threads": torch.get_num_threads(), "rounds": rounds, "cpu": records.processor(), "macs": shape.macs}
        row["torch_uses"] = torch.backends.cpu.get_cpu_capability()
        for layout in ("last", "first"):
            name = f"{a} {base} {layout}"
            ratios = [theirs / ours for theirs, ours in zip(times[full], times[name], strict=True)]
            row |= {f"{layout}_ms": round(middle[name], 3), f"{layout}_ratio": round(middle[full] / middle[name], 2)}
            row[f"{layout}_spread"] = "-".join(f"{value:.1f}" for value in _spread(ratios))
        row |= {"full": full, "full_ms": round(middle[full], 3)}
        row |= {f"{name}, ms": round(middle[name], 3) for name in (*FULL, INT8) if name in middle}
        row["int8_ratio"] = round(middle[INT8] / row["last_ms"], 2) if INT8 in middle else None
        rows.append(row)
    return rows


def _in_turn(contenders: dict[str, Contender], rounds: int, advance: Callable[[int], None]) -> dict[str, list[float]]:
    """Seconds of one call, the median of each of `rounds` turns."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, work in contenders.items():
            _calls(work, WARM_S)
            found[name].append(statistics.median(_calls(work, TIMED_S)))
        advance(1)
    return found


def _calls(work: Contender, seconds: float) -> list[float]:
    """How long each call took, for so long in all."""
    took: list[float] = []
    while sum(took) < seconds:
        start = time.perf_counter()
        work()
        took.append(time.perf_counter() - start)
    return took


def _packed(shape: Conv, bits: int, bases: int, layout: str) -> Contender:
    """The packed operator. Two bases are one layer of twice the outputs and a sum (Eq. 18)."""
    k, n = shape.kernel, shape.outputs * bases
    low = -(2 ** (bits - 1)) if bits > 1 else 0
    zero = -low if bits < ops.REAL else 0
    told = ops.Shape(shape.channels, n, (k, k), *[(part, part) for part in (shape.stride, shape.padding)], bits, zero)
    weight = ops.arrange(ops.pack_signs(torch.randn(n, shape.channels, k, k)), told)
    sigma, bias, x = torch.rand(n), torch.rand(n), _input(shape, layout == "last")
    arguments = ([k, k], [shape.stride] * 2, [shape.padding] * 2, bits, 0.3, 0.0, float(low))

    def work() -> Tensor:
        y = torch.ops.bdm.conv2d.default(x, weight, sigma, bias, *arguments)
        first, *more = y.chunk(bases, 1)
        return sum(more, start=first)

    return work


def _input(shape: Conv, last: bool) -> Tensor:
    x = torch.randn(1, shape.channels, shape.side, shape.side)
    return x.contiguous(memory_format=torch.channels_last) if last else x


def _full_precision(shape: Conv, onnx: bool) -> dict[str, Contender]:
    def of(last: bool) -> Contender:
        conv = nn.Conv2d(shape.channels, shape.outputs, shape.kernel, shape.stride, shape.padding)
        conv = conv.to(memory_format=torch.channels_last) if last else conv
        x = _input(shape, last)
        return lambda: conv(x)

    found = {FULL[0]: of(False), FULL[1]: of(True)}
    if onnx and importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
        found |= {FULL[2]: _onnx(shape, False), INT8: _onnx(shape, True)}
    return found


def _onnx(shape: Conv, int8: bool) -> Contender:
    """ONNX Runtime's convolution; int8: quantize, QLinearConv with a scale per output channel, dequantize."""
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    k, side = shape.kernel, shape.side
    weight = random.normal(size=(shape.outputs, shape.channels, k, k)).astype(np.float32)
    pads = {"pads": [shape.padding] * 4, "strides": [shape.stride] * 2}
    if int8:
        constants = {
            "w": np.clip(np.round(weight * 30), -127, 127).astype(np.int8),
            "b": np.zeros(shape.outputs, np.int32),
            "w_scale": np.full(shape.outputs, 1 / 30, np.float32),
            "w_zero": np.zeros(shape.outputs, np.int8),
            "x_scale": np.float32(0.03),
            "y_scale": np.float32(1.0),
            "zero": np.uint8(128),
        }
        operands = ["x8", "x_scale", "zero", "w", "w_scale", "w_zero", "y_scale", "zero", "b"]
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "x_scale", "zero"], ["x8"]),
            helper.make_node("QLinearConv", operands, ["y8"], **pads),
            helper.make_node("DequantizeLinear", ["y8", "y_scale", "zero"], ["y"]),
        ]
    else:
        constants = {"w": weight, "b": np.zeros(shape.outputs, np.float32)}
        nodes = [helper.make_node("Conv", ["x", "w", "b"], ["y"], **pads)]
    sizes = {"x": [1, shape.channels, side, side], "y": [1, shape.outputs, *[side // shape.stride] * 2]}
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name, size in sizes.items()]
    held = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "conv", ends[:1], ends[1:], held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # its threads rest while others run
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = {"x": _input(shape, False).numpy()}
    return lambda: session.run(None, x)


def chosen(which: str) -> Sequence[Conv]:
    """main: MAIN; all: every shape of the network."""
    return MAIN if which == "main" else network_shapes(recipes.load(NETWORK))


def network_shapes(spec: Recipe) -> list[Conv]:
    """The distinct shapes of a network's 1-bit layers at more than one position; projections are 1x1 convolutions."""
    found = {}
    for layer in cost.of_unet(spec.unet, build_unet).layers:
        side = math.isqrt(layer.inputs // layer.shape[1])
        out = math.isqrt(layer.outputs // layer.shape[0])
        kernel = layer.shape[2] if len(layer.shape) > 2 else 1
        if not layer.edge and out > 1:
            side -= side % out  # a padded input
            found[Conv(layer.shape[1], layer.shape[0], kernel, side, max(1, side // out))] = None
    return sorted(found, key=lambda conv: (-conv.side, conv))


# ---- the whole step ------------------------------------------------------------------------------------------------


def step(bits: int, rounds: int, threads: int | None, network: str = NETWORK) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One denoising step of a recipe's network at batch 1, random weights: packed, and fp32 in both memory formats.

    Returns a row per contender with time, spread and peak memory (in a process of its own: loading and one step), and
    where the packed step's time goes.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    ops.keep_memory()
    spec = recipes.load(network, [f"method.activation_bits={bits}"])
    inputs = student.random_inputs(spec, 1, torch.Generator().manual_seed(0))
    try:
        with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
            path = Path(temporary) / "packed.safetensors"
            output.say(f"packing {spec.unet.name} with random weights")
            finished = student.random_finished(spec, 0)
            pack.write(path, pack.pack(finished, spec, 0, 0, [0.0], random=True))
            del finished
            packed = pack.read(path)
            unets = {
                "packed": student.unpacked(packed, path, fused=True),
                "plain": student.unpacked(packed, path),
                "full": build_unet(spec.unet).eval(),
                "last": build_unet(spec.unet).eval().to(memory_format=torch.channels_last),
            }
            inputs_last = (inputs[0].contiguous(memory_format=torch.channels_last), *inputs[1:])
            contenders: dict[str, Contender] = {
                "packed": lambda: estimate_noise(unets["packed"], *inputs),
                "packed, blocks not fused": lambda: estimate_noise(unets["plain"], *inputs),
                FULL[0]: lambda: estimate_noise(unets["full"], *inputs),
                FULL[1]: lambda: estimate_noise(unets["last"], *inputs_last),
            }
            with output.progress("whole step", rounds, "rounds") as advance:
                times = _in_turn(contenders, rounds, advance)
            split = _split(contenders["packed"], bits)
            unets.clear()
            output.say("peak memory, each in a process of its own")
            threads = torch.get_num_threads()
            peaks = {
                "packed": measure.alone(_run_packed, path, inputs, threads),
                FULL[0]: measure.alone(_run_full, spec, inputs, threads),
                "": measure.alone(_run_nothing, inputs, threads),
            }
    finally:
        torch.set_num_threads(before)
    middle = {name: statistics.median(found) * 1e3 for name, found in times.items()}
    best = min((name for name in FULL if name in times), key=middle.get)
    rows = []
    for name, found in times.items():
        ratios = [theirs / ours for theirs, ours in zip(times[best], found, strict=True)]
        row: dict[str, object] = {"contender": name, "bits": f"1/{bits}" if name not in FULL else "32/32"}
        row |= {"ms": round(middle[name], 1), "ratio": round(middle[best] / middle[name], 2)}
        row |= {"spread": "-".join(f"{value:.1f}" for value in _spread(ratios))}
        row["peak_mib"] = round(peaks[name].peak_mib) if name in peaks else None
        row["model_mib"] = round(peaks[name].peak_mib - peaks[""].peak_mib) if name in peaks else None
        rows.append(row)
        told = {"network": spec.unet.name, "path": ops.path(), "threads": threads, "rounds": rounds}
        told["cpu"] = records.processor()
        shares = split.set_index("Part")["Share (%)"].to_dict() if name == "packed" else {}
        _append({"task": "step"} | row | told | ({"shares": shares} if shares else {}))
    names = {
        "contender": f"Step of {spec.unet.name}",
        "bits": "W/A",
        "ms": "ms",
        "ratio": "x fp32",
        "spread": "10-90 %",
    }
    names |= {"peak_mib": "Peak MiB", "model_mib": "without Python's, MiB"}
    return pd.DataFrame(rows)[list(names)].rename(columns=names), split


PARTS = {
    "1-bit convolutions, with what they fuse": ("bdm::conv2d",),
    "1-bit projections and linears": ("bdm::linear",),
    "attention products": ("bdm::attention", "aten::_scaled_dot_product_flash_attention_for_cpu"),
    "normalisation": ("bdm::group_affine", "aten::native_group_norm"),
    "joining skip connections": ("aten::cat",),
    "upsampling, padding": ("aten::upsample_nearest2d", "aten::constant_pad_nd", "aten::copy_", "aten::fill_"),
}


def _split(work: Contender, bits: int) -> pd.DataFrame:
    """Where a step's time goes, by operator; 'edges and the rest': the 8-bit layers and all small operators."""
    work()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(STEPS):
            work()
    own = {event.key: event.self_cpu_time_total / 1e3 / STEPS for event in found.key_averages()}
    rows = [(part, sum(own.pop(key, 0.0) for key in keys)) for part, keys in PARTS.items()]
    rows.append(("edges and the rest", sum(own.values())))
    whole = sum(ms for _, ms in rows)
    table = pd.DataFrame(rows, columns=["Part", "ms"])
    table["Share (%)"] = (100 * table["ms"] / whole).round(1)
    table["ms"] = table["ms"].round(2)
    real = table["Share (%)"][2:].sum()
    table.loc[len(table)] = ["all", round(whole, 2), 100.0]
    table.loc[len(table)] = [f"of that not binarized (W1A{bits})", round(whole * real / 100, 2), round(real, 1)]
    return table


def _run_packed(path: Path, inputs: tuple[Tensor, ...], threads: int) -> None:
    torch.set_num_threads(threads)
    unet = student.unpacked(pack.read(path), path, fused=True)
    with torch.inference_mode():
        estimate_noise(unet, *inputs)


def _run_full(spec: Recipe, inputs: tuple[Tensor, ...], threads: int) -> None:
    torch.set_num_threads(threads)
    unet = build_unet(spec.unet).eval()
    with torch.inference_mode():
        estimate_noise(unet, *inputs)


def _run_nothing(inputs: tuple[Tensor, ...], threads: int) -> None:
    torch.set_num_threads(threads)


# ---- numbers -------------------------------------------------------------------------------------------------------


def _spread(values: Sequence[float]) -> tuple[float, float]:
    """The 10th and the 90th percentile."""
    ordered = sorted(values)
    return ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]


def _geometric(values: Sequence[float | None]) -> float | None:
    real = [value for value in values if value]
    return round(math.exp(statistics.fmean(map(math.log, real))), 2) if len(real) == len(values) else None


def _record(recipe: str, ratio: float) -> None:
    """A speed-up for the report. It rests on no training: the recipe's file is that of the network."""
    digest = recipes.load(NETWORK).digest
    measured = {"recipe": recipe, "digest": digest, "seed": 0, "metric": "speedup", "value": ratio}
    records.append(records.make(run="bench-inference", **measured, steps=0, wall_s=0.0, device="cpu"))


def _append(row: dict[str, object]) -> None:
    runs.append_line(runs.bench_dir() / "inference.jsonl", row | records.provenance() | {"time": records.now()})
