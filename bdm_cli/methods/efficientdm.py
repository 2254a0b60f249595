"""EfficientDM (ICLR 2024, arXiv:2310.03270): LoRA below a few-bit grid, a step size per sampling step, no data."""

import math
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from bdm_cli.diffusion.sampling import times
from bdm_cli.methods.base import Keeper, Layer, Method, closed
from bdm_cli.quant.quantizers import Grid, Quantizer, SignWeight, Term
from bdm_cli.quant.reconstruction import affine_range, affine_search
from bdm_cli.quant.ste import passing
from bdm_cli.quant.swap import Site, Timed, quantized_layers

SEARCHED = 2**18
"""Numbers of a tensor, evenly spaced, from which its range is found, beside its least and its greatest."""


def affine_ste(x: Tensor, d: Tensor, z: Tensor, high: int) -> Tensor:
    """Uniform affine quantization with the released code's gradients.

    q = d (clip(u, 0, high) - z), u = round(x / d + z), whole z;  with 1 = 1[0 <= u <= high]:
    dq/dx = 1;  dq/dd = u - z - x / d where 1, else clip(u) - z;  dq/dz = -d where not 1, else 0.
    """
    v = x / d + z
    return (clip(passing(v.round(), v), 0, high) - z) * d


def clip(x: Tensor, low: float, high: float) -> Tensor:
    """x clipped, with gradient 1 in the range and on its ends, where torch.clamp has 0 in some versions."""
    return torch.where((x >= low) & (x <= high), x, x.detach().clamp(low, high))


class LearnedGrid(Quantizer):
    """Few-bit weights on a grid per output channel with a learned scale and a fixed zero point (released code).

    q(w) = d_c (clip(round(w / d_c + z_c), 0, 2^b - 1) - z_c); gradients: affine_ste.
    Start: the grid covers the channel's weights and 0 (affine_range; the code's "naive" quantization).

    Shapes: w [C_out, ...]; sigma (d) and zero (z) [C_out, 1, ...]. State: sigma (parameter), zero (buffer).
    """

    def __init__(self, bits: int, weight: Tensor) -> None:
        super().__init__()
        self.bits, self.high = bits, 2**bits - 1
        shape = (-1, *[1] * (weight.dim() - 1))
        sigma, zero = (found.view(shape) for found in affine_range(weight.detach().flatten(1), bits))
        self.sigma = nn.Parameter(sigma)
        self.register_buffer("zero", zero)

    def forward(self, weight: Tensor) -> Tensor:
        return affine_ste(weight, self.sigma, self.zero, self.high)

    def terms(self, weight: Tensor) -> list[Term]:
        levels = (weight / self.sigma + self.zero).round().clamp(0, self.high) - self.zero
        return [Term(self.bits, 0, levels, self.sigma.flatten(), self.zero.flatten())]


class LoraWeight(Quantizer):
    """Weights with a trained addition of low rank, quantized as a sum: q(W0 + B A) (EfficientDM's QALoRA).

    W0 is frozen. A [r, C_in, kh, kw] ([r, C_in] of linears) is a convolution of W0's kernel to r channels, B [C_out, r]
    one of kernel 1 behind it: their composition is a convolution with B A. At inference only q(W0 + B A) is left.
    rounded: W0 = d w, where the layer's weight w holds the whole numbers that W0 was first rounded to (released code;
    d the quantizer's own scale, which trains); else the layer's weight is W0 itself.
    Start: A Kaiming-uniform with slope sqrt(5), B = 0: so A has no gradient before B's first step. No further scaling.

    Shapes: w as the layer's weight, [C_out, ...]. State: a, b (parameters); quantizer; start (buffer), the mean of d at
    the start, on which the rate of A and B depends.
    """

    def __init__(self, weight: Tensor, quantizer: LearnedGrid | SignWeight, rank: int, rounded: bool) -> None:
        super().__init__()
        self.bits, self.rounded = quantizer.bits, rounded
        self.quantizer = quantizer
        self.a = nn.Parameter(torch.empty(rank, *weight.shape[1:]))
        self.b = nn.Parameter(torch.zeros(len(weight), rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.register_buffer("start", quantizer.sigma.detach().mean())

    def merged(self, weight: Tensor) -> Tensor:
        """W0 + B A."""
        base = self.quantizer.sigma * weight if self.rounded else weight
        return base + (self.b @ self.a.flatten(1)).view_as(weight)

    def forward(self, weight: Tensor) -> Tensor:
        return self.quantizer(self.merged(weight))

    def terms(self, weight: Tensor) -> list[Term]:
        return self.quantizer.terms(self.merged(weight))


class Talsq(Timed, Quantizer):
    """Activation quantizer with a learned step size and zero point for every sampling step (TALSQ).

    q(x) = d_j (clip(round(x / d_j + z), 0, 2^b - 1) - z), z = round(z_j); gradients: affine_ste, d z/d z_j = 1.
    1 bit, which the released code refuses: d_j sgn(x - z_j), dq/dx = 1[|x - z_j| <= d_j], dq/dz_j = -dq/dx,
    dq/dd_j = sgn(x - z_j) - dq/dx (x - z_j) / d_j.
    j is the entry whose time is nearest to the image's own. The released code counts calls instead, which is the same
    along the sampler that it was trained with; to sample in fewer steps it takes every r-th entry (as this does, where
    the times are among its own), the paper speaks of interpolation. The code's z_j is not rounded, so that its lowest
    and its highest level lie off the grid; rounded, activations can be added and packed as whole numbers.
    The code keeps one parameter for all d_j of a layer and one for all z_j, too: AdamW moves an entry by its momentum
    after the step that used it.

    Start (calibrate_), of every entry alike as in the released code: its search among 80 ranges (affine_search, which
    has 0 in every range; on at most 2^18 numbers of x). 1 bit: d = mean|x|, z = 0.

    Shapes: x and q(x) [N, ...]; timestep [N] or [1]. State: scale, zero (parameters), times (buffer) [S]; scale is NaN
    until calibrate_.
    """

    def __init__(self, bits: int, times: Sequence[float]) -> None:
        super().__init__()
        self.bits, self.high = bits, 2**bits - 1
        self.scale = nn.Parameter(torch.full((len(times),), torch.nan))
        self.zero = nn.Parameter(torch.zeros(len(times)))
        self.register_buffer("times", torch.tensor(times, dtype=torch.float32))

    @property
    def waiting(self) -> bool:
        return bool(self.scale.isnan().any())

    @torch.no_grad()
    def calibrate_(self, x: Tensor) -> None:
        if self.bits == 1:
            scale, zero = x.abs().mean(), torch.zeros(())
        else:
            some = x.flatten()
            if len(some) > SEARCHED:
                some = torch.cat([some[:: -(-len(some) // SEARCHED)], torch.stack(x.aminmax())])
            scale, zero = affine_search(some[None], self.bits)
        self.scale.copy_(scale.clamp_min(1e-8).expand(len(self.times)))
        self.zero.copy_(zero.expand(len(self.times)))

    def entries(self, times: Tensor) -> Tensor:
        """The indices j of times [N]."""
        return (times.to(self.times).view(-1, 1) - self.times).abs().argmin(1)

    def forward(self, x: Tensor) -> Tensor:
        index, shape = self.entries(self.timestep), (-1, *[1] * (x.dim() - 1))
        d, z = self.scale[index].view(shape), self.zero[index].view(shape)
        if self.bits == 1:
            return d * passing(torch.where(x >= z, 1.0, -1.0), clip((x - z) / d, -1, 1))
        return affine_ste(x, d, passing(z.round(), z), self.high)

    def grid(self, times: Sequence[float] | None = None) -> Grid:
        index = self.entries(self.timestep if times is None else torch.tensor(times))
        if times is None:
            index = index.unique()
            if len(index) > 1:
                raise NotImplementedError("its images have a step size each, by their times")
        d, z = self.scale.detach()[index], self.zero.detach()[index]
        return Grid(1, -1, z, d) if self.bits == 1 else Grid(self.bits, 0, z.round(), d)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, steps={len(self.times)}"


@closed
class EfficientDm(Method):
    """Data-free fine-tuning of low-rank additions to rounded weights, of scales, and of a table of activation ranges.

    The student follows the teacher's estimates along the teacher's own sampling trajectories, one training step per
    call; there are no images. Only A, B, the weights' scales and the activations' tables train. The edges keep the
    baseline's 8-bit LSQ, which does not train (released code: 8 bits, as first set). Operands of attentions, where they
    are quantized (attention_matmul; not in the released code), have tables, too.

    Against the released code: its loss is the sum of squares over the batch too (train.loss "mse-sum": its mean over
    the images), after classifier-free guidance where there is any (here of the network's own estimates); its
    trajectories have eta = 1 while it samples with eta = 0 (here both are the recipe's sample.eta); its weight decay is
    AdamW's default 0.01. Zero points: see Talsq.

    weight_bits: 1 is BiDM's row, whose quantizer is stated nowhere and which the released code refuses: here
        sigma_c sgn(W0 + B A) with a learned sigma_c that starts at mean|W0| (the baseline's binarizer).
    rank: of B A.
    base: what W0 is: 'rounded', the nearest points of the grid (released code, which stores W0 as whole numbers), or
        'real', the teacher's weights.
    coverage: 'all' layers, as BinaryDM's tables count; 'released': without convs on ResBlocks' shortcuts and in
        down-samplers, and without attentions' projections where the original has them as 1-d convs.
    start_images: of the first trajectory, evenly spaced over all its calls: what every quantizer starts from.
    lr_lora_divisor: A and B train at (mean of the layer's scales at the start) / this; lr_weight_scale, lr_activation:
        rates of the weights' scales and of the tables. All are absolute: train.lr gives only what they are multiplied
        with by train.lr_schedule and train.warmup.
    """

    data_free: ClassVar[bool] = True

    activation_bits: Literal[1, 2, 3, 4, 5, 6, 7, 8, 32] = 4
    weight_bits: Literal[1, 2, 3, 4, 5, 6, 7, 8] = 4
    rank: Annotated[int, Field(ge=1)] = 32
    base: Literal["rounded", "real"] = "rounded"
    coverage: Literal["all", "released"] = "all"
    start_images: Annotated[int, Field(ge=1)] = 32
    lr_lora_divisor: Annotated[float, Field(gt=0)] = 2500.0
    lr_weight_scale: Annotated[float, Field(ge=0)] = 1e-6
    lr_activation: Annotated[float, Field(ge=0)] = 5e-4

    def keep_fp(self, site: Site) -> bool:
        if super().keep_fp(site):
            return True
        flat = site.projection and self.host.unet.kind == "UNet2DModel"
        down = ".downsamplers." in site.name and site.name.endswith(".conv")
        return self.coverage == "released" and (site.skip or down or flat)

    def weight_quantizer(self, layer: Layer, site: Site) -> Quantizer:
        if site.edge:
            return super().weight_quantizer(layer, site)
        one_bit = self.weight_bits == 1
        quantizer = SignWeight(layer.weight) if one_bit else LearnedGrid(self.weight_bits, layer.weight)
        return LoraWeight(layer.weight, quantizer, self.rank, self.base == "rounded")

    def activation_quantizer(self, layer: nn.Module, site: Site) -> Quantizer | None:
        if site.edge or self.activation_bits == 32:
            return super().activation_quantizer(layer, site)
        return self.table()

    def attention_quantizer(self, operand: str, site: Site) -> Quantizer:
        return self.table()

    def table(self) -> Talsq:
        s = self.host.sample
        listed = times(s.sampler, self.host.scheduler, s.steps, s.spacing)
        return Talsq(self.activation_bits, list(dict.fromkeys(listed)))

    @torch.no_grad()
    def quantize_(self, unet: nn.Module) -> None:
        super().quantize_(unet)
        unet.requires_grad_(False)
        for module in unet.modules():
            if isinstance(module, LoraWeight | Talsq):
                module.requires_grad_(True)
        for _, layer in quantized_layers(unet):
            if isinstance(layer.weight_quantizer, LoraWeight) and layer.weight_quantizer.rounded:
                layer.weight.copy_(layer.weight_quantizer.quantizer.terms(layer.weight)[0].levels)

    def calibrate_(
        self, student: nn.Module, teacher: nn.Module, batches: Iterable[tuple], keeper: Keeper | None = None
    ) -> None:
        """Start every activation quantizer from images of all times, in one forward."""
        s = self.host.sample
        calls = list(islice(batches, len(times(s.sampler, self.host.scheduler, s.steps, s.spacing))))
        images = [torch.cat(parts) for parts in zip(*calls, strict=True)]
        chosen = torch.linspace(0, len(images[0]) - 1, min(self.start_images, len(images[0]))).round().long()
        chosen = chosen.to(images[0].device)
        super().calibrate_(student, teacher, [tuple(part[chosen] for part in images)])

    def lr_factors(self, student: nn.Module) -> dict[str, float]:
        lr, found = self.host.train.lr, {}
        for name, module in student.named_modules():
            if isinstance(module, LoraWeight):
                rate = float(module.start) / self.lr_lora_divisor / lr
                found |= {f"{name}.a": rate, f"{name}.b": rate, f"{name}.quantizer.sigma": self.lr_weight_scale / lr}
            elif isinstance(module, Talsq):
                found |= dict.fromkeys((f"{name}.scale", f"{name}.zero"), self.lr_activation / lr)
        return found
