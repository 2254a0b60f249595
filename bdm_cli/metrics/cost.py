"""Model size and operations of a U-Net at given bit-widths (BinaryDM, arXiv:2404.05662, App. B.1, Eqs. 16-17).

Counted on the real network, from one forward on the meta device: no weights, no arithmetic. `network_cost` takes a
network apart; `bill` says what each part costs at given bits, in a given structure; `total` adds the parts up.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from bdm_cli import recipe as recipes
from bdm_cli.quant.swap import Block, Site, sites, timestep_blocks
from bdm_cli.recipe import Unet

FP_BITS = 32
MIB = 2**20
GIGA = 1e9

SCALES = ("none", "paper", "all")
"""Which fp32 scales count. paper: those of convs and linears but the attentions' projections, in the size alone (with
edges in fp32 this gives every 2-, 4- and 8-bit size of BinaryDM's Table 2, and the 37.3 MB of BiDM's Table 4, to the
digit). all: every scale, and one multiplication per output number."""

ALPHA_ROWS = 100
"""BiDM keeps one mixing weight per block for every ten timesteps (released code: a table of 100 rows)."""


@dataclass(frozen=True)
class LayerCost:
    """One conv or linear layer, in one forward of one image.

    kind: conv, linear or projection (an attention's q, k, v and output). shape: of the weight.
    inputs, outputs: numbers read and written.
    """

    site: Site
    kind: str
    shape: tuple[int, ...]
    weights: int
    biases: int
    macs: int
    inputs: int
    outputs: int

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
    """The products QK^T and AV of one attention."""

    name: str
    block: int | None
    macs: int


@dataclass(frozen=True)
class Other:
    """A norm or an embedding: parameters that are never quantized."""

    name: str
    block: int | None
    parameters: int


@dataclass(frozen=True)
class NetworkCost:
    """A network taken apart. block_outputs: how many numbers each timestep block puts out.

    The papers' OPs leave the attentions out (the 96.0 G of LDM-4 are its convs and linears alone).
    """

    layers: list[LayerCost]
    attentions: list[Attention]
    others: list[Other]
    blocks: list[Block]
    block_outputs: list[int]

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
    """What a method's network has at inference beyond layers of few bits. One of STRUCTURES.

    plain: nothing. high-order: two binary bases in every layer of 1-bit weights (BinaryDM, Eq. 18). lmb: only in the
        first and last `scope` timestep blocks (early versions of BinaryDM, "W1.1").
    bidm: BiDM (arXiv:2412.05926) as released: binary layers without bias and with a threshold per input channel; on
        convs a learned filter of the mean magnitude K and a shortcut, with a 1x1 conv in fp32 where channels change;
        the ResBlocks' skip convs in fp32; the last `connections` blocks mixed with those of the previous timestep.
    bidm-paper: as BiDM's Table 4 counts: nothing of the above; skip convs of 1 bit in the size, of fp32 in the OPs.
    """

    name: str = "plain"
    scope: int = 6
    connections: int = 8

    def bases(self, layer: LayerCost, weight_bits: int) -> int:
        """Binary bases that a layer's weights consist of at inference."""
        if weight_bits > 1 or layer.edge:
            return 1
        two = self.name == "high-order" or (self.name == "lmb" and layer.site.region(self.scope) in ("head", "tail"))
        return 2 if two else 1


STRUCTURES = {"plain": None, "high-order": (1, None), "lmb": (1, None), "bidm": (1, 1), "bidm-paper": (1, 1)}
"""Names of Structure, each with the (weight, activation) bits that it is for; None = any."""

PLAIN = Structure()

BY_METHOD = {
    **dict.fromkeys(("", "fp", "baseline", "ebb", "lsq", "tdq", "qdiffusion", "efficientdm"), "plain"),
    "highorder": "high-order",
    "bidm": "bidm",
}
"""The structure of a method by its name in recipe ids. What the others add to a network is counted nowhere here."""


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
    """One line of a bill. kind: the layer's; or attention, other, mixing. bits: None for what is no layer."""

    name: str
    kind: str
    block: int | None
    shape: tuple[int, ...] = ()
    macs: int = 0
    bits: tuple[int, int] | None = None


# ---- a network taken apart -----------------------------------------------------------------------------------------


def network_cost(unet: nn.Module, inputs: Mapping[str, torch.Tensor] | None = None) -> NetworkCost:
    """Count one forward `unet(**inputs)` of one image; network and inputs on the meta device.

    inputs: default: meta_inputs(unet). Raises: ValueError for a layer that the forward runs twice or not at all.
    """
    placed = {layer: site for site, layer in sites(unet)}
    blocks = timestep_blocks(unet)
    shapes: dict[str, tuple[torch.Size, torch.Size]] = {}
    block_outputs: dict[str, int] = {}

    def keep(name: str):
        def hook(module: nn.Module, args: tuple, result: torch.Tensor) -> None:
            if name in shapes:
                raise ValueError(f"layer {name} runs twice in one forward")
            shapes[name] = args[0].shape, result.shape

        return hook

    def measure(name: str):
        def hook(module: nn.Module, args: tuple, result: torch.Tensor | tuple[torch.Tensor]) -> None:
            block_outputs[name] = (result if isinstance(result, torch.Tensor) else result[0]).numel()

        return hook

    modules = dict(unet.named_modules())
    hooks = [layer.register_forward_hook(keep(site.name)) for layer, site in placed.items()]
    hooks += [modules[b.output].register_forward_hook(measure(b.output)) for b in blocks if b.output in modules]
    try:
        with torch.no_grad():
            unet(**(meta_inputs(unet) if inputs is None else inputs))
    finally:
        for hook in hooks:
            hook.remove()
    if unused := {site.name for site in placed.values()} - shapes.keys():
        raise ValueError(f"layers that the forward does not reach: {sorted(unused)}")

    def block(name: str) -> int | None:
        return next((b.index for b in blocks if any(f"{name}.".startswith(f"{m}.") for m in b.modules)), None)

    attentions, others = [], []
    for name, module in modules.items():
        if hasattr(module, "to_q"):
            queries, keys = shapes[f"{name}.to_q"][1], shapes[f"{name}.to_k"][1]  # [1, L, D], [1, L', D]: 2 L L' D
            attentions.append(Attention(name, block(name), 2 * queries.numel() * keys[1]))
        own = sum(p.numel() for p in module.parameters(recurse=False))
        if own and module not in placed:
            others.append(Other(name, block(name), own))
    layers = [_layer_cost(site, layer, *shapes[site.name]) for layer, site in placed.items()]
    return NetworkCost(layers, attentions, others, blocks, [block_outputs.get(b.output, 0) for b in blocks])


def meta_inputs(unet: nn.Module) -> dict[str, torch.Tensor]:
    """Arguments of one forward with one image: size and channels from the network's own configuration."""
    config = unet.config
    size = config.sample_size if isinstance(config.sample_size, int) else config.sample_size[0]
    found = {
        "sample": torch.empty(1, config.in_channels, size, size, device="meta"),
        "timestep": torch.empty(1, device="meta"),
    }
    if hasattr(unet, "class_embedder"):
        found["classes"] = torch.zeros(1, dtype=torch.long, device="meta")
    elif getattr(config, "cross_attention_dim", None):
        found["encoder_hidden_states"] = torch.empty(1, 1, config.cross_attention_dim, device="meta")
    return found


def _layer_cost(site: Site, layer: nn.Conv2d | nn.Linear, read: torch.Size, written: torch.Size) -> LayerCost:
    """Every output number takes as many MACs as the layer has weights per output channel."""
    shape = tuple(layer.weight.shape)
    kind = "conv" if isinstance(layer, nn.Conv2d) else "projection" if site.projection else "linear"
    weights, biases = layer.weight.numel(), 0 if layer.bias is None else layer.bias.numel()
    macs = written.numel() * (weights // shape[0])
    return LayerCost(site, kind, shape, weights, biases, macs, read.numel(), written.numel())


@functools.cache
def _counted(unet: str, build: Callable[[Unet], nn.Module]) -> NetworkCost:
    with torch.device("meta"):
        return network_cost(build(Unet.model_validate_json(unet)))


def of_unet(spec: Unet, build: Callable[[Unet], nn.Module]) -> NetworkCost:
    """A recipe's network, taken apart once per process. build: diffusion.models.build_unet."""
    return _counted(spec.model_dump_json(), build)


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
    if scales not in SCALES or structure.name not in STRUCTURES:
        raise ValueError(f"scales '{scales}' or structure '{structure.name}' does not exist")
    if structure.name.startswith("bidm") and (bits.weight, bits.activation) != (1, 1):
        raise ValueError(f"the structure '{structure.name}' is for 1/1, not for {bits}")
    price = {"bidm": _bidm, "bidm-paper": _bidm_paper}.get(structure.name, _few_bits)
    parts = [price(layer, bits, structure, scales) for layer in cost.layers]
    parts += [Part(other.parameters * FP_BITS, 0, 0, other.name, "other", other.block) for other in cost.others]
    if attention:
        parts += [Part(0, 0, a.macs, a.name, "attention", a.block, macs=a.macs) for a in cost.attentions]
    if structure.name == "bidm":
        mixed = list(zip(cost.blocks, cost.block_outputs, strict=True))[-structure.connections :]
        parts += [  # (1 - alpha) * U + alpha * U_previous: two products per number
            Part(ALPHA_ROWS * FP_BITS, 0, 2 * outputs, f"{block.output} mixing", "mixing", block.index)
            for block, outputs in mixed
        ]
    return parts


def _few_bits(layer: LayerCost, bits: Bits, structure: Structure, scales: str) -> Part:
    weight, activation = bits.of(layer)
    real = FP_BITS in (weight, activation)
    bases = structure.bases(layer, weight)  # with real activations two bases add up to one real weight
    n_scales, products = _scales(layer, (weight, activation), bases, scales)
    return _part(
        layer,
        (weight, activation),
        size_bits=layer.weights * weight * bases + (layer.biases + n_scales) * FP_BITS,
        bops=0 if real else layer.macs * bases * weight * activation,
        flops=(layer.macs if real else 0) + products,
    )


def _part(layer: LayerCost, used: tuple[int, int], size_bits: int, bops: int, flops: int) -> Part:
    name, block = layer.name, layer.site.block
    return Part(size_bits, bops, flops, name, layer.kind, block, layer.shape, layer.macs, used)


def _scales(layer: LayerCost, used: tuple[int, int], bases: int, scales: str) -> tuple[int, int]:
    """How many scales count, and the multiplications by them."""
    weight, activation = used
    if scales == "none" or (scales == "paper" and layer.kind == "projection"):
        return 0, 0
    found = layer.channels * bases * (weight < FP_BITS) + (activation < FP_BITS)
    return found, layer.outputs * bases if scales == "all" and weight < FP_BITS else 0


def _bidm_paper(layer: LayerCost, bits: Bits, structure: Structure, scales: str) -> Part:
    part = _few_bits(layer, bits, structure, scales)
    return _part(layer, part.bits, part.size_bits, bops=0, flops=layer.macs) if layer.skip else part


def _bidm(layer: LayerCost, bits: Bits, structure: Structure, scales: str) -> Part:
    """BiDM's binary layer as released. Thresholds of plain linears have no effect there and do not count."""
    if layer.edge or layer.skip:
        return _few_bits(layer, bits if layer.edge else Bits(), structure, scales)
    n_out, n_in, *kernel = layer.shape
    taps = kernel[0] * kernel[1] if kernel else 1
    real, flops = _scales(layer, (1, FP_BITS), 1, scales)  # K stands in place of an activation scale
    if layer.kind != "linear":
        real += n_in  # thresholds
        flops += layer.inputs
    if layer.kind == "conv":
        real += taps + 1 + 1  # the filter with its bias, gamma
        flops += layer.inputs + taps * layer.outputs // n_out  # mean |x| over channels, filtered to K
        flops += 2 * layer.outputs  # times K; plus gamma times the shortcut
        if n_in != n_out:
            real += n_in * n_out
            flops += n_in * layer.outputs
    return _part(layer, (1, 1), layer.weights + real * FP_BITS, layer.macs, flops)


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


def parse_recipe(name: str) -> tuple[str, tuple[int, int], str | None]:
    """(data set, bits of weights and activations, structure) of a recipe id such as 'bedrooms-w1a4-highorder'.

    The structure is None where the method adds to the network what is not counted here.
    Raises: ValueError if the name is no recipe id.
    """
    match = re.fullmatch(r"(.+?)-(?:fp|w(\d+)a(\d+))(?:-(\w+))?(?:\+.*)?", name)
    if not match:
        raise ValueError(f"'{name}' is not a recipe id <data set>-w<bits>a<bits>[-<method>]")
    dataset, weight, activation, method = match.groups()
    bits = (int(weight), int(activation)) if weight else (FP_BITS, FP_BITS)
    return dataset, bits, BY_METHOD.get(method or "")


def of_recipe(name: str, build: Callable[[Unet], nn.Module]) -> dict[str, float]:
    """`metrics` of a recipe id of the tables, with the recipe's edge bits and the paper's choice of scales.

    Of a recipe that has no file, the edges have 8 bits as in the paper's text (BiDM: 32, as released). Empty where
    the method adds to the network what is not counted here. build: diffusion.models.build_unet.
    """
    dataset, (weight, activation), structure = parse_recipe(name)
    if structure is None:
        return {}
    known = recipes.names()
    file = name.partition("+")[0]
    spec = recipes.load(file if file in known else f"{dataset}-fp")
    edge = spec.method.get("edge_bits") if file in known else None
    bits = Bits(weight, activation, edge or (FP_BITS if structure == "bidm" else 8))
    cost = of_unet(spec.unet, build)
    full = total(bill(cost, Bits()))
    if weight == FP_BITS:
        return metrics(full, full)
    return metrics(total(bill(cost, bits, Structure(structure), scales="paper")), full)
