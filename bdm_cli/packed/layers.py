"""Layers that compute on packed bits, and putting them into a U-Net. They draw; they do not train."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdm_cli.errors import BdmError
from bdm_cli.packed import ops, pack
from bdm_cli.packed.pack import OPERANDS, Layer, Levels, Packed
from bdm_cli.quant.frames import Frame
from bdm_cli.quant.layers import Parts, QuantAttnProcessor, QuantConv2d, QuantLinear
from bdm_cli.quant.quantizers import Grid, Quantizer, Term
from bdm_cli.quant.swap import replace_


class LevelsWeight(Quantizer):
    """A weight that is kept as its levels, less their zero points: q(w) = sigma_c * w.

    State: sigma (buffer) [C_out, 1, ...]; zero (buffer) [C_out], if it has zero points.
    """

    def __init__(self, layer: Layer, sigma: Tensor, zero: Tensor | None = None) -> None:
        super().__init__()
        self.bits, self.low = layer.bits, layer.low
        self.register_buffer("sigma", sigma.view(-1, *[1] * (len(layer.shape) - 1)), persistent=False)
        self.register_buffer("zero", zero, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        return self.sigma * weight

    def terms(self, weight: Tensor) -> list[Term]:
        return [Term(self.bits, self.low, weight, self.sigma.flatten(), self.zero)]


class _Stepped(nn.Module):
    """What quantizes activations to a Grid with one step, or with one per sampling time (then NaN until `select`).

    levels: None = they stay real. offsets: one per step, in place of the levels' zero point; of 1 bit, thresholds.
    """

    def __init__(self, levels: Levels | None, steps: Tensor | None, offsets: Tensor | None = None) -> None:
        super().__init__()
        self.bits, self.low, self.zero = (ops.REAL, 0, 0) if levels is None else levels
        self.steps = (1.0,) if steps is None else tuple(steps.tolist())
        self.offsets = None if offsets is None else tuple(offsets.tolist())
        self.step, self.offset = math.nan, None
        if len(self.steps) == 1:
            self.select(0)

    def select(self, index: int) -> None:
        """Take the step, and the offset, of the index-th sampling time."""
        index = index if len(self.steps) > 1 else 0
        self.step, self.offset = self.steps[index], None if self.offsets is None else self.offsets[index]

    def threshold(self, channels: int, device: torch.device) -> Tensor | None:
        """Of 1 bit: what each channel is compared with [channels]; None: 0."""
        if self.bits > 1 or self.offset is None:
            return None
        return torch.full((channels,), self.offset, device=device)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, low={self.low}, zero={self.zero}"


class GridActivation(_Stepped, Quantizer):
    """x -> step * (clip(round(x / step + zero), low, low + 2^bits - 1) - zero), bit for bit as simulated."""

    def forward(self, x: Tensor) -> Tensor:
        zero = self.zero if self.offset is None else self.offset
        return ops.levels(x, self.bits, self.step, zero, self.low, self.threshold(1, x.device)).mul_(self.step)

    def grid(self, times: Sequence[float] | None = None) -> Grid:
        steps, offsets = ([self.step], [self.offset]) if times is None else (self.steps, self.offsets)
        zero = self.zero if self.offsets is None else torch.tensor(offsets)
        return Grid(self.bits, self.low, zero, torch.tensor(steps))


class _PackedLayer(_Stepped):
    """What convolution and matrix product share: y = sum over bases of sigma * (levels * signs) + bias (see ops).
    With a frame: y = after(x, sum of before(x), bias).

    The bases are computed as one layer of bases * K outputs, so that they share what is done to the input.
    State: arranged, sigma, bias (buffers). The arrangement is this process's own: state_dict() is refused.
    """

    def __init__(
        self, bits: Tensor, sigma: Tensor, bias: Tensor | None, shape: ops.Shape, levels: Levels | None,
        steps: Tensor | None, frame: Frame | None, offsets: Tensor | None,
    ) -> None:  # fmt: skip
        super().__init__(levels, steps, offsets)
        self.bases, self.outputs = sigma.shape
        self.inputs = shape.channels
        self.frame = frame
        whole = shape._replace(outputs=sigma.numel(), bits=self.bits, zero=self.zero - self.low)
        own = bias
        if bias is not None:
            own = torch.cat([bias.float(), bias.new_zeros(sigma.numel() - self.outputs, dtype=torch.float32)])
        self.register_buffer("arranged", ops.arrange(bits.flatten(0, 1), whole), persistent=False)
        self.register_buffer("sigma", sigma.float().flatten(), persistent=False)
        self.register_buffer("bias", None if frame else own, persistent=False)
        self.register_buffer("framed_bias", bias.float() if frame and bias is not None else None, persistent=False)

    def framed(self, x: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
        """The layer's output of its input alone, its frame around the product."""
        if self.frame is None:
            return product(x)
        return self.frame.after(x, product(self.frame.before(x)), self.framed_bias)

    def check(self, channels: int) -> None:
        if channels != self.inputs:
            raise ValueError(f"the input has {channels} channels; {type(self).__name__} takes {self.inputs}")

    def summed(self, y: Tensor, axis: int, residual: Tensor | None) -> Tensor:
        """[..., bases * K, ...] -> [..., K, ...]; of one basis, the residual is in y already."""
        if self.bases == 1:
            return y
        first, *more = y.chunk(self.bases, axis)
        return sum(more if residual is None else [*more, residual], start=first)

    def _save_to_state_dict(self, *arguments: object) -> None:
        raise ValueError("packed layers hold what only this process can read; copy the packed file instead")


class PackedConv2d(_PackedLayer):
    """A convolution with 1-bit weights. Shapes: x fp32 [N, C, H, W] in either memory format, which y has, too."""

    def __init__(
        self, conv: nn.Conv2d, bits: Tensor, sigma: Tensor, bias: Tensor | None, levels: Levels | None = None,
        steps: Tensor | None = None, frame: Frame | None = None, offsets: Tensor | None = None,
    ) -> None:  # fmt: skip
        shape = ops.Shape(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
        super().__init__(bits, sigma, bias, shape, levels, steps, frame, offsets)
        self.place = [list(part) for part in (conv.kernel_size, conv.stride, conv.padding)]

    def forward(
        self, x: Tensor, before: tuple[Tensor, Tensor] | None = None, silu: bool = False, more: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Around a layer without frame: before: (gain, shift) [N, C]: x is first replaced by gain x + shift, and with
        `silu` by its SiLU. more [N, K] and residual, shaped as y, are added to y."""
        self.check(x.shape[1])
        if self.frame is not None:
            if (before, more, residual) != (None, None, None):
                raise ValueError("a layer with a frame is not fused with what stands around it")
            return self.framed(x, self.product)
        return self.product(x, before, silu, more, residual)

    def product(
        self, x: Tensor, before: tuple[Tensor, Tensor] | None = None, silu: bool = False, more: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As forward, without the frame."""
        gain, shift = before or (None, None)
        bias = self.bias
        if more is not None:
            bias = F.pad(more, (0, len(self.sigma) - self.outputs)) + (0 if bias is None else bias)
        y = torch.ops.bdm.conv2d.default(
            x, self.arranged, self.sigma, bias, *self.place, self.bits, self.step, self.zero, self.low,
            self.threshold(self.inputs, x.device), gain, shift, silu, residual if self.bases == 1 else None,
        )  # fmt: skip
        return self.summed(y, 1, residual)


class PackedLinear(_PackedLayer):
    """A matrix product with 1-bit weights. Shapes: x fp32 [..., C], y [..., K]."""

    def __init__(
        self, linear: nn.Linear, bits: Tensor, sigma: Tensor, bias: Tensor | None, levels: Levels | None = None,
        steps: Tensor | None = None, frame: Frame | None = None, offsets: Tensor | None = None,
    ) -> None:  # fmt: skip
        shape = ops.Shape(linear.in_features, linear.out_features)
        super().__init__(bits, sigma, bias, shape, levels, steps, frame, offsets)

    def forward(self, x: Tensor, before: tuple[Tensor, Tensor] | None = None, residual: Tensor | None = None) -> Tensor:
        """Around a layer without frame: before: (gain, shift) [N, C]: x [N, L, C] is first replaced by gain x + shift.
        residual is added to y."""
        self.check(x.shape[-1])
        if self.frame is not None:
            if (before, residual) != (None, None):
                raise ValueError("a layer with a frame is not fused with what stands around it")
            return self.framed(x, self.product)
        return self.product(x, before, residual)

    def product(self, x: Tensor, before: tuple[Tensor, Tensor] | None = None, residual: Tensor | None = None) -> Tensor:
        """As forward, without the frame."""
        gain, shift = before or (None, None)
        y = torch.ops.bdm.linear.default(
            x, self.arranged, self.sigma, self.bias, self.bits, self.step, self.zero, self.low,
            self.threshold(self.inputs, x.device), gain, shift, residual if self.bases == 1 else None,
        )  # fmt: skip
        return self.summed(y, -1, residual)


def unpack_(unet: nn.Module, packed: Packed) -> None:
    """Make a U-Net on the meta device the packed one, in place; strictly. Its layers may be a student's: their frames
    stay.

    Layers of 1-bit weights compute on the bits, without an fp32 copy of them. Those of more bits are simulated, as are
    attentions with quantized operands: the same numbers as the student's.
    Raises: ValueError if the file is not of this network.
    """
    header, tensors = packed.header, packed.tensors
    modules, replacement, rest = dict(unet.named_modules()), {}, packed.rest()
    for name, layer in header.layers.items():
        plain = modules.get(name)
        bits, sigma, zero, bias, steps, offsets = (tensors.get(f"{name}.{part}") for part in pack.PARTS)
        _check(name, plain, layer, bias)
        frame = getattr(plain, "frame", None)
        if layer.bits == 1:
            kind = PackedConv2d if isinstance(plain, nn.Conv2d) else PackedLinear
            replacement[plain] = kind(plain, bits, sigma, bias, layer.input, steps, frame, offsets)
        else:
            kind = QuantConv2d if isinstance(plain, nn.Conv2d) else QuantLinear
            activation = layer.input and GridActivation(layer.input, steps, offsets)
            replacement[plain] = kind(plain, Parts(LevelsWeight(layer, sigma.float(), zero), activation, frame))
            rest[f"{name}.weight"] = pack.levels(bits[0], layer, zero)
            rest |= {} if bias is None else {f"{name}.bias": bias}
    replace_(unet, replacement)
    for name, operands in header.attentions.items():
        steps = [pack.step_name(name, part) for part in OPERANDS]
        if not hasattr(modules.get(name), "set_processor"):
            raise ValueError(f"the network has no attention {name}")
        found = [(tensors[step], tensors.get(pack.offset_name(step))) for step in steps]
        quantizers = [GridActivation(levels, *own) for levels, own in zip(operands, found, strict=True)]
        modules[name].set_processor(QuantAttnProcessor(*quantizers))
    try:
        unet.load_state_dict({name: tensor.float() for name, tensor in rest.items()}, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(" ".join(str(error).split())[:400]) from None
    if pack.TIMES in tensors:
        unet.register_buffer(pack.TIMES, tensors[pack.TIMES], persistent=False)
        unet.register_forward_pre_hook(_select, with_kwargs=True)


def _check(name: str, plain: nn.Module | None, layer: Layer, bias: Tensor | None) -> None:
    if not isinstance(plain, nn.Conv2d | nn.Linear) or tuple(plain.weight.shape) != layer.shape:
        told = "no such layer" if plain is None else type(plain).__name__
        if isinstance(plain, nn.Conv2d | nn.Linear):
            told += f" {tuple(plain.weight.shape)}"
        raise ValueError(f"{name} has weights {layer.shape} in the file; the network has {told}")
    if (plain.bias is None) != (bias is None):
        raise ValueError(f"{name} has {'a' if bias is not None else 'no'} bias in the file, not so in the network")


def _select(unet: nn.Module, arguments: tuple, options: dict) -> None:
    """Before each call: the steps of the time at which the network is called, in all modules of this very U-Net."""
    time = options["timestep"] if "timestep" in options else arguments[1]
    found = (unet.times == torch.as_tensor(time, dtype=torch.float32).reshape(-1, 1)).nonzero()
    indices = set(found[:, 1].tolist())
    if len(indices) != 1 or len(found) != torch.as_tensor(time).numel():
        raise BdmError(
            f"this model has steps for {len(unet.times)} sampling times alone, and was called at {time}.\n"
            "  sample with the sampler and the steps that it was exported for (bdm inspect shows them)"
        )
    for module in unet.modules():
        if isinstance(module, _Stepped):
            module.select(*indices)
