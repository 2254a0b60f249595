"""The packed file: a student whose weights are bits, with all that draws images from it (`bdm export`).

Safetensors. Of each quantized layer with K output channels of n weights:

    <name>.weight  uint8 [bases, K, ceil(n bits / 8)], least significant bit first, without gaps; 1 bit: 1 where the
                   sign is +1 (ops.pack_signs); b bits: level - low
    <name>.sigma   [bases, K]; w = sum over the bases of sigma * level (two: arXiv:2404.05662, Eqs. 5 and 18)
    <name>.zero    int32 [K], if it has zero points (more than 1 bit): w = sigma * (level - zero)
    <name>.bias    [K], if it has one
    <name>.step    fp32, of its input: [1], or [S] with one per sampling time
    <name>.offset  fp32, one per step, if the zero points of its input (1 bit: thresholds) depend on the sampling time

`<attention>.processor.<operand>_quantizer.step` and `.offset`: of quantized operands. `times` fp32 [S]: the sampling
times, if anything depends on them. All else, a layer's frame included, has the student's own names. sigma, biases and
what is not quantized: fp32 or fp16.
The metadata holds `format`, `version`, `header` (a Header as JSON), and `sha256` of header and tensors together.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import pydantic
import torch
from pydantic import Field
from torch import Tensor, nn

from bdm_cli import records, tensorfile
from bdm_cli.errors import BdmError
from bdm_cli.packed import ops
from bdm_cli.quant.layers import QuantAttnProcessor, QuantConv2d, QuantLinear
from bdm_cli.quant.quantizers import Quantizer, Term
from bdm_cli.quant.swap import quantized_layers
from bdm_cli.recipe import Recipe

FORMAT, VERSION = "bdm-packed", 1
TIMES = "times"
PARTS = ("weight", "sigma", "zero", "bias", "step", "offset")
"""Tensors of a quantized layer."""

OPERANDS = ("q", "k", "probability", "v")
"""Of an attention, in the order of QuantAttnProcessor's arguments."""

AGAIN = "copy it again, or make it again with bdm export; nothing was loaded"


class Levels(NamedTuple):
    """What a Grid says beside its steps. zero: 0 where there are offsets."""

    bits: Annotated[int, Field(ge=1, le=8)]
    low: int
    zero: int


class _Closed(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class Layer(_Closed):
    """One quantized layer. shape, bits, low, bases: of its weight; input: None where that is not quantized."""

    shape: Annotated[tuple[int, ...], Field(min_length=2, max_length=4)]
    bits: Annotated[int, Field(ge=1, le=8)] = 1
    low: int = -1
    bases: Annotated[int, Field(ge=1)] = 1
    input: Levels | None = None

    @property
    def row(self) -> int:
        """Weights of one output channel."""
        return torch.Size(self.shape[1:]).numel()

    @property
    def row_bytes(self) -> int:
        return -(-self.row * self.bits // 8)


class Header(_Closed):
    """Where a packed file comes from, and its quantized layers and attentions (see OPERANDS) by name.

    random: the weights are random, to measure size and speed. half: sigma, biases and what is not quantized are fp16.
    """

    recipe: Recipe
    seed: int
    step: int
    commit: str
    random: bool = False
    half: bool = False
    layers: dict[str, Layer]
    attentions: dict[str, tuple[Levels, Levels, Levels, Levels]] = {}

    def text(self) -> str:
        table = self.model_dump(mode="json", exclude={"layers"})
        layers = {name: layer.model_dump(mode="json", exclude_defaults=True) for name, layer in self.layers.items()}
        return json.dumps(table | {"layers": layers}, separators=(",", ":"))

    def steps(self) -> Iterator[tuple[str, Levels]]:
        """Names of the tensors that hold steps, each with what else is known of its grid."""
        yield from ((f"{name}.step", layer.input) for name, layer in self.layers.items() if layer.input is not None)
        for name, operands in self.attentions.items():
            yield from zip((step_name(name, part) for part in OPERANDS), operands, strict=True)


class Packed(NamedTuple):
    """A packed file's content, as it lies there. sha256: as the file has it; '' before it is written."""

    header: Header
    tensors: dict[str, Tensor]
    sha256: str = ""

    def rest(self) -> dict[str, Tensor]:
        """What belongs to no quantized layer, under the student's own names."""
        steps = {name for name, _ in self.header.steps()}
        known = steps | {offset_name(name) for name in steps} | {TIMES}
        known |= {f"{name}.{part}" for name in self.header.layers for part in PARTS}
        return {name: tensor for name, tensor in self.tensors.items() if name not in known}

    def counted_bits(self) -> int:
        """The model size of Eq. 16: weights at their bits, all else in 32, without scales and steps."""
        layers = self.header.layers
        few = sum(layer.shape[0] * layer.row * layer.bits * layer.bases for layer in layers.values())
        real = [tensor for name, tensor in self.tensors.items() if name.removesuffix(".bias") in layers]
        return few + 32 * sum(tensor.numel() for tensor in [*real, *self.rest().values()])


def step_name(attention: str, operand: str) -> str:
    return f"{attention}.processor.{operand}_quantizer.step"


def offset_name(step: str) -> str:
    """The name of the offsets that belong to these steps."""
    return f"{step.removesuffix('step')}offset"


# ---- packing -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def pack(
    student: nn.Module, spec: Recipe, seed: int, step: int, times: Sequence[float], half: bool = False,
    random: bool = False,
) -> Packed:  # fmt: skip
    """A student in packed form.

    times: at which the recipe's sampler calls the network; steps that depend on them are tabulated.
    Raises: BdmError that names the layer, if one has no packed form, or nothing is quantized.
    """
    times = list(dict.fromkeys(times))
    layers, attentions, tensors = {}, {}, {}
    for name, layer in quantized_layers(student):
        layers[name], found = _of_layer(name, layer, times)
        tensors |= {f"{name}.{part}": tensor for part, tensor in found.items()}
    for name, processor in student.named_modules():
        if isinstance(processor, QuantAttnProcessor):
            attention = name.removesuffix(".processor")
            found = [_grid(name, getattr(processor, f"{part}_quantizer"), times) for part in OPERANDS]
            attentions[attention] = tuple(levels for levels, _ in found)
            for part, (_, own) in zip(OPERANDS, found, strict=True):
                tensors |= {f"{attention}.processor.{part}_quantizer.{name}": tensor for name, tensor in own.items()}
    if not layers:
        raise BdmError(
            f"method '{spec.method['name']}' quantizes no layer; there is nothing to pack.\n"
            "  its weights.safetensors is the whole model already"
        )
    if any(len(tensor) > 1 for name, tensor in tensors.items() if name.endswith(".step")):
        tensors[TIMES] = torch.tensor(times, dtype=torch.float32)
    inside = tuple([f"{name}." for name in layers] + [f"{name}.processor." for name in attentions])
    frames = tuple(f"{name}.frame." for name in layers)
    tensors |= {
        name: tensor
        for name, tensor in student.state_dict().items()
        if name.startswith(frames) or not name.startswith(inside)
    }
    header = Header(
        recipe=spec, seed=seed, step=step, commit=records.provenance()["commit"], random=random, half=half,
        layers=layers, attentions=attentions,
    )  # fmt: skip
    return Packed(header, _halved(tensors, header) if half else tensors)


def _of_layer(name: str, layer: QuantConv2d | QuantLinear, times: Sequence[float]) -> tuple[Layer, dict[str, Tensor]]:
    """A layer's row of the header and its tensors."""
    terms, levels, found = _terms(name, layer), None, {}
    bits, low = terms[0][:2]
    found["weight"] = torch.stack([_bits(term) for term in terms])
    found["sigma"] = torch.stack([term.sigma.expand(len(layer.weight)) for term in terms])
    if terms[0].zero is not None:
        found["zero"] = terms[0].zero.to(torch.int32)
    if layer.bias is not None:
        found["bias"] = layer.bias
    if layer.activation_quantizer is not None:
        levels, own = _grid(name, layer.activation_quantizer, times)
        if "offset" in own and bits == 1 and levels.bits > 1:
            raise _refused(name, "its input has zero points by sampling time, and its weights are of 1 bit")
        found |= own
    return Layer(shape=tuple(layer.weight.shape), bits=bits, low=low, bases=len(terms), input=levels), found


def _terms(name: str, layer: QuantConv2d | QuantLinear) -> list[Term]:
    if layer.weight_quantizer is None:
        raise _refused(name, "its weights are not quantized, only its input")
    try:
        terms = layer.weight_quantizer.terms(layer.weight)
    except NotImplementedError as error:
        raise _refused(name, str(error)) from None
    if len(terms) > 1 and any(term.bits > 1 for term in terms):
        raise _refused(name, "it is a sum of several terms of more than 1 bit")
    if terms[0].bits == 1 and any(term.zero is not None for term in terms):
        raise _refused(name, "its weights are of 1 bit and have zero points")
    if terms[0].bits == 1 and isinstance(layer, nn.Conv2d):
        given = (layer.groups, layer.dilation, layer.padding_mode, isinstance(layer.padding, str))
        if given != (1, (1, 1), "zeros", False):
            raise _refused(
                name,
                f"groups {layer.groups}, dilation {layer.dilation}, padding {layer.padding} ({layer.padding_mode}), "
                "where 1-bit convolutions have one group, dilation 1 and so many zeros around",
            )
    return terms


def _grid(name: str, quantizer: Quantizer, times: Sequence[float]) -> tuple[Levels, dict[str, Tensor]]:
    """Of quantized activations: what the header says, and the tensors step and, if it has any, offset."""
    try:
        grid = quantizer.grid(times)
    except NotImplementedError as error:
        raise _refused(name, str(error)) from None
    if not (grid.step.isfinite() & (grid.step != 0)).all():
        raise _refused(name, f"the step size of its input is {grid.step.tolist()}; was it calibrated?")
    if len(grid.step) not in (1, len(times)):
        raise ValueError(f"{name}: {len(grid.step)} steps for {len(times)} times")
    if isinstance(grid.zero, Tensor):
        if grid.zero.shape != grid.step.shape:
            raise ValueError(f"{name}: {len(grid.zero)} zero points for {len(grid.step)} steps")
        return Levels(grid.bits, grid.low, 0), {"step": grid.step, "offset": grid.zero}
    return Levels(grid.bits, grid.low, grid.zero), {"step": grid.step}


def _refused(name: str, reason: str) -> BdmError:
    return BdmError(
        f"layer {name} has no packed form: {reason}.\n"
        "  draw from the run itself (bdm sample --run); a method's quantizers say how they pack in `terms` and `grid`"
    )


def _halved(tensors: dict[str, Tensor], header: Header) -> dict[str, Tensor]:
    steps = {name for name, _ in header.steps()}
    exact = steps | {offset_name(name) for name in steps} | {TIMES}
    halved = {
        name: tensor if name in exact or not tensor.is_floating_point() else tensor.half()
        for name, tensor in tensors.items()
    }
    for name, tensor in halved.items():
        if not tensor.isfinite().all():
            raise BdmError(f"{name} goes beyond 16-bit floats (65504).\n  leave out --half")
    return halved


def _bits(term: Term) -> Tensor:
    """uint8 [K, row_bytes] of levels [K, ...]."""
    if term.bits == 1:
        return ops.pack_signs(term.levels)
    levels = term.levels.flatten(1)
    above = (levels if term.zero is None else levels + term.zero[:, None]).sub(term.low).to(torch.uint8)
    bits = above[:, :, None] >> torch.arange(term.bits, dtype=torch.uint8) & 1
    return ops.pack_signs(bits.char() * 2 - 1)


def levels(weight: Tensor, layer: Layer, zero: Tensor | None = None) -> Tensor:
    """uint8 [K, row_bytes] of more than 1 bit -> the levels, less zero [K] if given, as fp32, shaped as the layer's
    weight."""
    bits = (weight[:, :, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(1)[:, : layer.row * layer.bits]
    above = bits.unflatten(1, (-1, layer.bits)) << torch.arange(layer.bits, dtype=torch.uint8)
    found = above.sum(-1, dtype=torch.uint8).float().add_(layer.low)
    return (found if zero is None else found.sub_(zero[:, None])).view(layer.shape)


# ---- on disk -------------------------------------------------------------------------------------------------------


def write(path: Path, packed: Packed) -> None:
    """Raises: BdmError if the file cannot be written."""
    metadata = {"format": FORMAT, "version": str(VERSION), "header": packed.header.text(), "sha256": digest(packed)}
    tensorfile.write(path, packed.tensors, metadata)


def digest(packed: Packed) -> str:
    """SHA-256 of the header, and of all tensors' names, types, shapes and bytes in the order of their names."""
    return _digest(packed.header.text(), packed.tensors)


def _digest(header: str, tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256(f"{header}\n".encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def read(path: Path) -> Packed:
    """A packed file, every byte of it checked.

    Raises: BdmError if it is missing, damaged, foreign, or of a newer version of the format.
    """
    tensors, metadata = tensorfile.read(path)
    if metadata.get("format") != FORMAT:
        hint = "give a file of bdm export"
        if "recipe" in metadata and "step" in metadata:
            hint = f"it is a model of bdm, not packed yet: bdm export {path} -o packed.safetensors"
        raise BdmError(f"{path} is not a packed model.\n  {hint}")
    version = metadata.get("version", "")
    if version != str(VERSION):
        raise BdmError(
            f"{path} is a packed model of format version {version}; this bdm reads version {VERSION}.\n"
            "  update bdm, or export the model again"
        )
    header = metadata.get("header", "")
    if metadata.get("sha256") != _digest(header, tensors):
        raise BdmError(f"{path} is damaged: its SHA-256 is not that of what was written.\n  {AGAIN}")
    try:
        packed = Packed(Header.model_validate_json(header, strict=True), tensors, metadata["sha256"])
    except pydantic.ValidationError as error:
        fault = error.errors()[0]
        told = f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
        raise BdmError(f"{path} has a header that this bdm cannot read ({told}).\n  {AGAIN}") from None
    faults = list(_faults(packed))
    if faults:
        more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise BdmError(f"{path} does not hold what its header says: {faults[0]}{more}.\n  {AGAIN}")
    return packed


def _faults(packed: Packed) -> Iterator[str]:
    """Tensors of the quantized layers that are missing, or not as the header has it."""
    header, tensors = packed.header, packed.tensors
    real = torch.float16 if header.half else torch.float32
    times = tensors[TIMES].numel() if TIMES in tensors else 0

    def fault(name: str, dtype: torch.dtype, *shapes: tuple[int, ...]) -> Iterator[str]:
        found = tensors.get(name)
        if found is None:
            yield f"{name} is missing"
        elif found.dtype != dtype or tuple(found.shape) not in shapes:
            yield f"{name} is {found.dtype} {tuple(found.shape)}, not {dtype} {' or '.join(map(str, shapes))}"

    for name, layer in header.layers.items():
        outputs = layer.shape[0]
        yield from fault(f"{name}.weight", torch.uint8, (layer.bases, outputs, layer.row_bytes))
        yield from fault(f"{name}.sigma", real, (layer.bases, outputs))
        if f"{name}.zero" in tensors:
            yield from fault(f"{name}.zero", torch.int32, (outputs,))
        if f"{name}.bias" in tensors:
            yield from fault(f"{name}.bias", real, (outputs,))
    for name, _ in header.steps():
        yield from fault(name, torch.float32, (1,), *([(times,)] if times > 1 else []))
        if offset_name(name) in tensors and name in tensors:
            yield from fault(offset_name(name), torch.float32, tuple(tensors[name].shape))
