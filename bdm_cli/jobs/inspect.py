"""`bdm inspect`: what a packed file holds, told from the file alone."""

from collections import Counter
from pathlib import Path

import pandas as pd
from torch import Tensor

from bdm_cli.packed import pack
from bdm_cli.packed.pack import Layer, Packed

KIB, MIB = 2**10, 2**20


def run(path: Path) -> pd.DataFrame:
    """Origin, layers by kind, and bytes by what they are for, as key and value. Raises: BdmError as pack.read."""
    packed = pack.read(path)
    header, size = packed.header, path.stat().st_size
    s = header.recipe.sample
    rows = {
        "file": path,
        "format": f"{pack.FORMAT} {pack.VERSION}",
        "SHA-256": f"{packed.sha256} (fits)",
        "recipe": header.recipe.id,
        "method": header.recipe.method["name"],
        "weights": "RANDOM, to measure size and speed" if header.random else f"after {header.step} training steps",
        "seed": header.seed,
        "commit": header.commit,
        "real numbers": "fp16 (activation steps: fp32)" if header.half else "fp32",
        "sampling, if not told otherwise": f"{s.sampler}, {s.steps} steps, eta {s.eta:g}, guidance {s.guidance:g}",
    }
    kinds = Counter(map(_kind, header.layers.values()))
    rows |= {f"layers, weights of {kind}": n for kind, n in sorted(kinds.items())}
    rows["layers and embeddings, real"] = len(_real(packed))
    if header.attentions:
        rows["attentions with quantized operands"] = len(header.attentions)
    if pack.TIMES in packed.tensors:
        rows["activation steps by sampling time"] = ", ".join(f"{t:g}" for t in packed.tensors[pack.TIMES].tolist())
    parts = _parts(packed)
    parts["header"] = size - sum(parts.values())
    rows |= {f"bytes, {part}": f"{n:,} ({100 * n / size:.2f} %)" for part, n in parts.items() if n}
    rows["bytes, all"] = f"{size:,} = {size / MIB:.3f} MiB"
    rows["size by Eq. 16"] = f"{packed.counted_bits() / 8 / MIB:.3f} MiB (without scales, steps and header)"
    return pd.DataFrame({"key": rows.keys(), "value": [str(value) for value in rows.values()]})


def layers(path: Path) -> pd.DataFrame:
    """One row per quantized layer; levels and step are those of its input. Raises: BdmError as pack.read."""
    packed = pack.read(path)
    return pd.DataFrame([_row(name, layer, packed.tensors) for name, layer in packed.header.layers.items()])


def _row(name: str, layer: Layer, tensors: dict[str, Tensor]) -> dict[str, object]:
    outputs, inputs, *kernel = layer.shape
    told = {"Input levels": "real", "Step": ""}
    if layer.input is not None:
        bits, low, zero = layer.input
        steps, offsets = tensors[f"{name}.step"].tolist(), tensors.get(f"{name}.offset")
        zeros = [zero] if offsets is None else [int(z) for z in offsets]
        levels = f"{low - max(zeros)}..{low - min(zeros) + 2**bits - 1}"
        told["Input levels"] = "-1, 1" if bits == 1 else levels
        told["Step"] = f"{steps[0]:.4g}" if len(steps) == 1 else f"{min(steps):.4g}..{max(steps):.4g}"
    return {
        "Layer": name,
        "Kind": f"conv {'x'.join(map(str, kernel))}" if kernel else "linear",
        "Inputs": inputs,
        "Outputs": outputs,
        "Weights": _kind(layer),
        **told,
        "KiB": round(sum(tensors[f"{name}.{p}"].nbytes for p in pack.PARTS if f"{name}.{p}" in tensors) / KIB, 2),
    }


def _kind(layer: Layer) -> str:
    bases = f", {layer.bases} bases" if layer.bases > 1 else ""
    return f"{layer.bits} bit{'s' if layer.bits > 1 else ''}{bases}"


def _real(packed: Packed) -> set[str]:
    """Modules with weights that are no norm's: what is not quantized."""
    plain = {name: tensor for name, tensor in packed.rest().items() if not _beside(name)}
    return {name.rpartition(".")[0] for name, tensor in plain.items() if tensor.dim() > 1}


def _beside(name: str) -> bool:
    """Whether a tensor is what a method adds around its layers and blocks."""
    return ".frame." in name or ".connection." in name


def _parts(packed: Packed) -> Counter[str]:
    """Bytes of the tensors by what they are for."""
    found, layers, real = Counter(), packed.header.layers, _real(packed)
    steps = {name for name, _ in packed.header.steps()}
    steps |= {pack.offset_name(name) for name in steps} | {pack.TIMES}
    for name, tensor in packed.tensors.items():
        module, _, part = name.rpartition(".")
        if name in steps:
            what = "activation steps"
        elif _beside(name):
            what = "thresholds, scales and shortcuts"
        elif module in layers:
            what = f"weights of {_kind(layers[module])}" if part == "weight" else {"bias": "biases"}.get(part, part)
        else:
            what = "real layers and embeddings" if module in real else "norms"
        found[what] += tensor.nbytes
    return found
