"""Model size and operations of a U-Net at given bit-widths (BinaryDM, arXiv:2404.05662, App. B.1, Eqs. 16-17).

Counted on the real network, from one forward on the meta device: no weights, no arithmetic. `network_cost` takes a
full-precision network apart, `student_cost` says what a method has made of it. `bill` is what each part costs at given
bits, in a given structure; `bill_as_built` what it costs as the method left it; `total` adds the parts up.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from bdm_cli import recipe as recipes
from bdm_cli.quant.layers import QuantAttnProcessor, QuantConv2d, QuantLinear
from bdm_cli.quant.quantizers import Lsq, Quantizer, SignActivation
from bdm_cli.quant.swap import Block, Site, Timed, meta_inputs, quantized_layers, sites, timestep_blocks
from bdm_cli.recipe import Recipe, Unet

FP_BITS = 32
MIB = 2**20
GIGA = 1e9

SCALES = ("none", "paper", "all")
"""Which fp32 scales count. paper: those of convs and linears but the attentions' projections, in the size alone (with
edges in fp32 this gives every 2-, 4- and 8-bit size of BinaryDM's Table 2, and the 37.3 MB of BiDM's Table 4, to the
digit). all: every scale, and one multiplication per output number. What a method's frames store and compute always
counts."""


@dataclass(frozen=True)
class Built:
    """What a layer consists of at inference.

    weight, activation: bits; 32 = real. bases: binary tensors that the weights are the sum of.
    weight_scales, input_scales: numbers in fp32 of its quantizers. framed: those of its frame; operations: what that
    computes in full precision.
    """

    weight: int = FP_BITS
    activation: int = FP_BITS
    bases: int = 1
    weight_scales: int = 0
    input_scales: int = 0
    framed: int = 0
    operations: int = 0

    @property
    def real(self) -> bool:
        """Whether its products are of real numbers on either side."""
        return FP_BITS in (self.weight, self.activation)


@dataclass(frozen=True)
class LayerCost:
    """One conv or linear layer, in one forward of one image.

    kind: conv, linear or projection (an attention's q, k, v and output). shape: of the weight.
    read, written: shapes of its input and output. built: what it consists of; in full precision, itself.
    """

    site: Site
    kind: str
    shape: tuple[int, ...]
    weights: int
    biases: int
    macs: int
    read: torch.Size
    written: torch.Size
    built: Built = Built()

    @property
    def inputs(self) -> int:
        return self.read.numel()

    @property
    def outputs(self) -> int:
        return self.written.numel()

    @property
    def name(self) -> str:
        return self.site.name

    @property
    def edge(self) -> bool:
        return self.site.edge

    @property
    def channels(self) -> int:
        return self.shape[0]

    @property
    def skip(self) -> bool:
        """Whether it is the 1x1 conv on a ResBlock's shortcut."""
        return self.site.skip


@dataclass(frozen=True)
class Attention:
    """The products QK^T and AV of one attention.

    bits: of the operands q, k, probabilities, v. scales: numbers in fp32 of their quantizers; operations: what these
    compute in full precision beside rounding.
    """

    name: str
    block: int | None
    macs: int
    bits: tuple[int, int, int, int] = (FP_BITS,) * 4
    scales: int = 0
    operations: int = 0


@dataclass(frozen=True)
class Other:
    """A norm or an embedding: parameters that are never quantized."""

    name: str
    block: int | None
    parameters: int


@dataclass(frozen=True)
class Extra:
    """What a method has put beside the layers: numbers in fp32, and operations in full precision."""

    name: str
    block: int | None
    numbers: int
    operations: int


@dataclass(frozen=True)
class NetworkCost:
    """A network taken apart.

    The papers' OPs leave the attentions out (the 96.0 G of LDM-4 are its convs and linears alone).
    """

    layers: list[LayerCost]
    attentions: list[Attention]
    others: list[Other]
    blocks: list[Block]
    extras: list[Extra] = dataclasses.field(default_factory=list)

    @property
    def attention_macs(self) -> int:
        return sum(attention.macs for attention in self.attentions)

    @property
    def other_parameters(self) -> int:
        return sum(other.parameters for other in self.others)


@dataclass(frozen=True)
class Bits:
    """Bits of weights and activations; `edge` of both in the layers next to input and output. 32 = full precision."""

    weight: int = FP_BITS
    activation: int = FP_BITS
    edge: int = FP_BITS

    def of(self, layer: LayerCost) -> tuple[int, int]:
        """(weight bits, activation bits); activations stay real everywhere where `activation` is 32."""
        if not layer.edge:
            return self.weight, self.activation
        return self.edge, FP_BITS if self.activation == FP_BITS else self.edge

    def __str__(self) -> str:
        return f"{self.weight}/{self.activation}"


@dataclass(frozen=True)
class Structure:
    """What layers of few bits consist of where no method has built them. One of STRUCTURES.

    plain: one basis. high-order: two binary bases in every layer of 1-bit weights (BinaryDM, Eq. 18). lmb: only in the
        first and last `scope` timestep blocks (early versions of BinaryDM, "W1.1").
    bidm-paper: as BiDM's Table 4 counts (arXiv:2412.05926): nothing that it adds; the ResBlocks' skip convs of 1 bit in
        the size, of fp32 in the OPs.
    """

    name: str = "plain"
    scope: int = 6

    def bases(self, layer: LayerCost, weight_bits: int) -> int:
        """Binary bases that a layer's weights consist of at inference."""
        if weight_bits > 1 or layer.edge:
            return 1
        two = self.name == "high-order" or (self.name == "lmb" and layer.site.region(self.scope) in ("head", "tail"))
        return 2 if two else 1


STRUCTURES = {"plain": None, "high-order": (1, None), "lmb": (1, None), "bidm-paper": (1, 1)}
"""Names of Structure, each with the (weight, activation) bits that it is for; None = any."""

PLAIN = Structure()

OF_METHOD = {
    **dict.fromkeys(("binarydm", "fp", "baseline", "ebb", "lsq", "tdq", "qdiffusion", "efficientdm"), "plain"),
    "highorder": "high-order",
}
"""The structure that stands for a method where no recipe says how it is built."""


@dataclass(frozen=True)
class Total:
    """Size in bits; operations of one forward of one image. ops = bops / 64 + flops (Eq. 17).

    flops: one per multiply-accumulate, as the papers count, and one per addition or multiplication that stands alone.
    """

    size_bits: int
    bops: int
    flops: int

    @property
    def size_mb(self) -> float:
        """MiB: the papers' megabytes."""
        return self.size_bits / 8 / MIB

    @property
    def ops(self) -> float:
        return self.bops / 64 + self.flops


@dataclass(frozen=True)
class Part(Total):
    """One line of a bill. kind: the layer's; or attention, other, extra. bits: None for what is no layer."""

    name: str
    kind: str
    block: int | None
    shape: tuple[int, ...] = ()
    macs: int = 0
    bits: tuple[int, int] | None = None


# ---- a network taken apart -----------------------------------------------------------------------------------------


def network_cost(unet: nn.Module, inputs: Mapping[str, torch.Tensor] | None = None) -> NetworkCost:
    """Count one forward `unet(**inputs)` of one image; network and inputs on the meta device.

    inputs: default: swap.meta_inputs(unet). Raises: ValueError for a layer that the forward runs twice or not at all.
    """
    placed = {layer: site for site, layer in sites(unet)}
    blocks = timestep_blocks(unet)
    shapes: dict[str, tuple[torch.Size, torch.Size]] = {}

    def keep(name: str):
        def hook(module: nn.Module, args: tuple, result: torch.Tensor) -> None:
            if name in shapes:
                raise ValueError(f"layer {name} runs twice in one forward")
            shapes[name] = args[0].shape, result.shape

        return hook

    hooks = [layer.register_forward_hook(keep(site.name)) for layer, site in placed.items()]
    try:
        with torch.no_grad():
            unet(**(meta_inputs(unet) if inputs is None else inputs))
    finally:
        for hook in hooks:
            hook.remove()
    if unused := {site.name for site in placed.values()} - shapes.keys():
        raise ValueError(f"layers that the forward does not reach: {sorted(unused)}")

    attentions, others = [], []
    for name, module in unet.named_modules():
        if hasattr(module, "to_q"):
            queries, keys = shapes[f"{name}.to_q"][1], shapes[f"{name}.to_k"][1]  # [1, L, D], [1, L', D]: 2 L L' D
            attentions.append(Attention(name, _block(blocks, name), 2 * queries.numel() * keys[1]))
        if own := _own(module) if module not in placed else 0:
            others.append(Other(name, _block(blocks, name), own))
    layers = [_layer_cost(site, layer, *shapes[site.name]) for layer, site in placed.items()]
    return NetworkCost(layers, attentions, others, blocks)


def _block(blocks: list[Block], name: str) -> int | None:
    return next((b.index for b in blocks if any(f"{name}.".startswith(f"{m}.") for m in b.modules)), None)


def _own(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters(recurse=False))


def _layer_cost(site: Site, layer: nn.Conv2d | nn.Linear, read: torch.Size, written: torch.Size) -> LayerCost:
    """Every output number takes as many MACs as the layer has weights per output channel."""
    shape = tuple(layer.weight.shape)
    kind = "conv" if isinstance(layer, nn.Conv2d) else "projection" if site.projection else "linear"
    weights, biases = layer.weight.numel(), 0 if layer.bias is None else layer.bias.numel()
    macs = written.numel() * (weights // shape[0])
    return LayerCost(site, kind, shape, weights, biases, macs, read, written)


@functools.cache
def _counted(unet: str, build: Callable[[Unet], nn.Module]) -> NetworkCost:
    with torch.device("meta"):
        return network_cost(build(Unet.model_validate_json(unet)))


def of_unet(spec: Unet, build: Callable[[Unet], nn.Module]) -> NetworkCost:
    """A recipe's network, taken apart once per process. build: diffusion.models.build_unet."""
    return _counted(spec.model_dump_json(), build)


# ---- what a method makes of it ---------------------------------------------------------------------------------------


class Outlined(Protocol):
    """A recipe's student as after training, on the meta device. times: those at which its sampler calls it."""

    unet: nn.Module
    times: Sequence[float]


def student_cost(full: NetworkCost, unet: nn.Module, times: Sequence[float]) -> NetworkCost:
    """What a method has made of a network: bits, bases, scales, frames and biases of each layer; what else it added.

    full: the same network in full precision, which knows all shapes. unet: after the training, on the meta device; it
        serves for nothing else afterwards.
    A module outside the layers with `stored()` and `operations(read, written)`, as frames have them, is an extra. What
    only the training needs (parameters inside quantizers that are no scales) does not count.
    """
    layers = {layer.name: layer for layer in full.layers}
    attentions = {attention.name: attention for attention in full.attentions}
    others, extras, inside = [], {}, ()
    for name, module in unet.named_modules():
        if name.startswith(inside):
            continue
        if name in layers:
            layers[name] = _built(layers[name], module, times)
        elif isinstance(module, QuantAttnProcessor):
            attention = name.removesuffix(".processor")
            projected = [layers[f"{attention}.to_{part}"].written for part in "qkv"]
            heads = unet.get_submodule(attention).heads
            attentions[attention] = _quantized(attentions[attention], module, projected, heads, times)
        elif hasattr(module, "stored") and hasattr(module, "operations"):
            extras[name] = module
        else:
            if own := _own(module):
                others.append(Other(name, _block(full.blocks, name), own))
            continue
        inside += (f"{name}.",)
    found = [
        Extra(name, _block(full.blocks, name), extras[name].stored(), operations)
        for name, operations in _operations(unet, extras).items()
    ]
    return NetworkCost(list(layers.values()), list(attentions.values()), others, full.blocks, found)


def _built(layer: LayerCost, module: nn.Module, times: Sequence[float]) -> LayerCost:
    biases = 0 if module.bias is None else module.bias.numel()
    if not isinstance(module, QuantConv2d | QuantLinear):
        return dataclasses.replace(layer, biases=biases)
    found, frame = {}, module.frame
    weight, activation = module.weight_quantizer, module.activation_quantizer
    if weight is not None and not module.weight_is_real:
        found["weight"], found["bases"], found["weight_scales"] = _of_weight(weight, module.weight)
    if activation is not None and not module.input_is_real:
        found |= {"activation": activation.bits, "input_scales": _of_input(activation, times)}
    if frame is not None:
        found |= {"framed": frame.stored(), "operations": frame.operations(layer.read, layer.written)}
    return dataclasses.replace(layer, biases=biases, built=Built(**found))


def _of_weight(quantizer: Quantizer, weight: torch.Tensor) -> tuple[int, int, int]:
    """(bits, bases, scales): as it says in whole numbers, where it does so without values; else its parameters.

    Zero points are no scales: they are integers of as few bits as a weight.
    """
    bits, bases, scales = quantizer.bits, 1, _own(quantizer)
    try:
        terms = quantizer.terms(weight)
    except RuntimeError as error:
        if not _expected(error, quantizer):
            raise
    else:
        bits, bases, scales = terms[0].bits, len(terms), sum(term.sigma.numel() for term in terms)
    return bits, bases, quantizer.stored() if hasattr(quantizer, "stored") else scales


def _expected(error: RuntimeError, quantizer: Quantizer) -> bool:
    """Whether it refuses, or is an LSQ, which looks at its zero point: the meta device has no values."""
    return isinstance(error, NotImplementedError) or isinstance(quantizer, Lsq)


def _of_input(quantizer: Quantizer, times: Sequence[float]) -> int:
    """Scales: what it says is `stored`; else none of a sign, the table over the times of a Timed one, or parameters."""
    if hasattr(quantizer, "stored"):
        return quantizer.stored()
    if isinstance(quantizer, SignActivation):
        return 0
    if not isinstance(quantizer, Timed):
        return sum(parameter.numel() for parameter in quantizer.parameters())
    try:
        grid = quantizer.grid(times)
    except NotImplementedError:
        return len(times)
    return sum(part.numel() for part in (grid.step, grid.zero) if isinstance(part, torch.Tensor))


def _quantized(
    attention: Attention, processor: QuantAttnProcessor, projected: Sequence[torch.Size], heads: int,
    times: Sequence[float],
) -> Attention:  # fmt: skip
    """projected: shapes [1, L, D] of q, k, v. An operand that lies on no even grid is multiplied as a real number."""
    q, k, v = (torch.Size((1, heads, size[1], size[2] // heads)) for size in projected)
    shapes = {"q": q, "k": k, "probability": torch.Size((1, heads, q[2], k[2])), "v": v}
    bits, scales, operations = [], 0, 0
    for operand, shape in shapes.items():
        quantizer = getattr(processor, f"{operand}_quantizer")
        bits.append(quantizer.bits if _even(quantizer, times) else FP_BITS)
        scales += _of_input(quantizer, times)
        operations += quantizer.operations(shape, shape) if hasattr(quantizer, "operations") else 0
    return dataclasses.replace(attention, bits=tuple(bits), scales=scales, operations=operations)


def _even(quantizer: Quantizer, times: Sequence[float]) -> bool:
    try:
        quantizer.grid(times)
    except RuntimeError as error:
        if not _expected(error, quantizer):
            raise
        return not isinstance(error, NotImplementedError)
    return True


def _operations(unet: nn.Module, extras: Mapping[str, nn.Module]) -> dict[str, int]:
    """Operations of each in one forward; the layers inside take their plain product, whose shapes are the same."""
    found = dict.fromkeys(extras, 0)

    def add(name: str):
        def hook(module: nn.Module, args: tuple, result: torch.Tensor) -> None:
            found[name] += module.operations(args[0].shape, result.shape)

        return hook

    if extras:
        for _, layer in quantized_layers(unet):
            kind = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
            layer.forward = functools.partial(kind.forward, layer)
        for name, module in extras.items():
            module.register_forward_hook(add(name))
        with torch.no_grad():
            unet(**meta_inputs(unet))
    return found


@functools.cache
def _student(recipe: str, build: Callable[[Unet], nn.Module], outline: Callable[[Recipe], Outlined]) -> NetworkCost:
    spec = Recipe.model_validate_json(recipe)
    student = outline(spec)
    return student_cost(of_unet(spec.unet, build), student.unet, student.times)


def of_student(spec: Recipe, build: Callable[[Unet], nn.Module], outline: Callable[[Recipe], Outlined]) -> NetworkCost:
    """A recipe's student after its training, taken apart once per process. outline: methods.outline."""
    return _student(spec.model_dump_json(), build, outline)


# ---- what it costs -------------------------------------------------------------------------------------------------


def bill(
    cost: NetworkCost, bits: Bits, structure: Structure = PLAIN, scales: str = "none", attention: bool = False
) -> list[Part]:
    """Every part of the network with its size and operations. Weights at their bits; all other parameters in fp32.

    BOPs = MACs * b_w * b_a (Eq. 16). With a 32-bit operand on either side a MAC is one FLOP instead.
    scales: one of SCALES: one scale per output channel and basis of quantized weights, one per layer of quantized
        activations.
    attention: count the products QK^T and AV, in full precision: no recipe of the papers quantizes them.
    """
    if structure.name not in STRUCTURES:
        raise ValueError(f"structure '{structure.name}' does not exist")
    if structure.name == "bidm-paper" and (bits.weight, bits.activation) != (1, 1):
        raise ValueError(f"the structure '{structure.name}' is for 1/1, not for {bits}")
    planned = [dataclasses.replace(layer, built=_planned(layer, bits, structure)) for layer in cost.layers]
    parts = bill_as_built(dataclasses.replace(cost, layers=planned), scales, attention)
    if structure.name == "bidm-paper":
        skips = {layer.name for layer in cost.layers if layer.skip}
        return [dataclasses.replace(part, bops=0, flops=part.macs) if part.name in skips else part for part in parts]
    return parts


def bill_as_built(cost: NetworkCost, scales: str = "none", attention: bool = False) -> list[Part]:
    """As `bill`, of a network as it is: that of `student_cost`, or in full precision.

    scales: of what the quantizers hold. attention: count its products, at the bits of their operands.
    """
    if scales not in SCALES:
        raise ValueError(f"scales '{scales}' does not exist")
    parts = [_part(layer, scales) for layer in cost.layers]
    parts += [Part(other.parameters * FP_BITS, 0, 0, other.name, "other", other.block) for other in cost.others]
    parts += [Part(e.numbers * FP_BITS, 0, e.operations, e.name, "extra", e.block) for e in cost.extras]
    parts += [_products(a, scales, attention) for a in cost.attentions if attention or a.operations or a.scales]
    return parts


def _planned(layer: LayerCost, bits: Bits, structure: Structure) -> Built:
    weight, activation = bits.of(layer)
    bases = structure.bases(layer, weight)
    scales = layer.channels * bases * (weight < FP_BITS)
    return Built(weight, activation, bases, scales, int(activation < FP_BITS))


def _part(layer: LayerCost, scales: str) -> Part:
    built = layer.built
    counted = scales == "all" or (scales == "paper" and layer.kind != "projection")
    numbers = layer.biases + built.framed + (built.weight_scales + built.input_scales) * counted
    rescaled = layer.outputs * built.bases if scales == "all" and built.weight_scales else 0
    return Part(
        size_bits=layer.weights * built.weight * built.bases + numbers * FP_BITS,
        bops=0 if built.real else layer.macs * built.bases * built.weight * built.activation,
        flops=layer.macs * built.real + rescaled + built.operations,  # with real inputs two bases add up to one weight
        name=layer.name,
        kind=layer.kind,
        block=layer.site.block,
        shape=layer.shape,
        macs=layer.macs,
        bits=(built.weight, built.activation),
    )


def _products(attention: Attention, scales: str, counted: bool) -> Part:
    """counted: whether its products are."""
    q, k, probabilities, v = attention.bits
    size, half = attention.scales * FP_BITS * (scales == "all"), attention.macs // 2 * counted
    bops, flops = 0, attention.operations
    for a, b in ((q, k), (probabilities, v)):
        if FP_BITS in (a, b):
            flops += half
        else:
            bops += half * a * b
    return Part(size, bops, flops, attention.name, "attention", attention.block, macs=2 * half)


def main_bits(cost: NetworkCost) -> Bits:
    """Those of most weights, away from the edges; and the widest weights of the edges."""
    found: dict[tuple[int, int], int] = {}
    for layer in cost.layers:
        if not layer.edge:
            key = (layer.built.weight, layer.built.activation)
            found[key] = found.get(key, 0) + layer.weights
    return Bits(*max(found, key=found.get), max(layer.built.weight for layer in cost.layers if layer.edge))


def total(parts: Iterable[Total]) -> Total:
    parts = list(parts)
    return Total(*(sum(getattr(part, what) for part in parts) for what in ("size_bits", "bops", "flops")))


def model_size_mb(cost: NetworkCost, bits: Bits) -> float:
    """MiB: weights at their bits; biases, norms and embeddings in fp32; without scales (see scales_mb)."""
    return total(bill(cost, bits)).size_mb


def scales_mb(cost: NetworkCost, bits: Bits) -> float:
    """MiB of the fp32 scales: one per output channel of quantized weights, one per layer of quantized activations."""
    return total(bill(cost, bits, scales="all")).size_mb - model_size_mb(cost, bits)


def operations(cost: NetworkCost, bits: Bits) -> Total:
    """Eqs. 16-17 over convs and linears: .bops, .flops, .ops of one forward of one image."""
    return total(bill(cost, bits))


# ---- the tables' rows ----------------------------------------------------------------------------------------------


def metrics(found: Total, full: Total) -> dict[str, float]:
    """The metrics of paper/cells.csv that are counted. full: the network in full precision."""
    return {
        "size_mb": found.size_mb,
        "bops_g": found.bops / GIGA,
        "flops_g": found.flops / GIGA,
        "ops_g": found.ops / GIGA,
        "size_saving": full.size_mb / found.size_mb,
        "ops_saving": full.ops / found.ops,
    }


def parse_recipe(name: str) -> tuple[str, tuple[int, int], str]:
    """(data set, bits of weights and activations, method) of a recipe id such as 'bedrooms-w1a4-highorder'.

    Raises: ValueError if the name is no recipe id.
    """
    match = re.fullmatch(r"(.+?)-(?:(fp)|w(\d+)a(\d+))(?:-(\w+))?(?:\+.*)?", name)
    if not match:
        raise ValueError(f"'{name}' is not a recipe id <data set>-w<bits>a<bits>[-<method>]")
    dataset, full, weight, activation, method = match.groups()
    bits = (FP_BITS, FP_BITS) if full else (int(weight), int(activation))
    return dataset, bits, method or full or "binarydm"


def of_recipe(name: str, build: Callable[[Unet], nn.Module], outline: Callable[[Recipe], Outlined]) -> dict[str, float]:
    """`metrics` of a recipe id of the tables, as its method builds it, with the paper's choice of scales.

    Of an id without a file, those of its bits with 8-bit edges, as in the paper's text; empty where the method adds to
    the network, or is unknown. build: diffusion.models.build_unet; outline: methods.outline.
    """
    file, *overrides = name.split("+")
    if file in recipes.names():
        spec = recipes.load(file, overrides)
        parts = bill_as_built(of_student(spec, build, outline), "paper")
    else:
        dataset, (weight, activation), method = parse_recipe(name)
        if method not in OF_METHOD or f"{dataset}-fp" not in recipes.names():
            return {}
        spec = recipes.load(f"{dataset}-fp")
        network, structure = of_unet(spec.unet, build), Structure(OF_METHOD[method])
        parts = bill(network, Bits(weight, activation, 8), structure, scales="paper")
    return metrics(total(parts), total(bill(of_unet(spec.unet, build), Bits())))
