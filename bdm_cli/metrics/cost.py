"""Model size and operations of a U-Net at given bit-widths (BinaryDM, arXiv:2404.05662, App. B.1, Eqs. 16-17).

Counted on the real network, from one forward on the meta device: no weights, no arithmetic.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from bdm_cli.quant.swap import EDGES

FP_BITS = 32
MIB = 2**20


@dataclass(frozen=True)
class LayerCost:
    """One conv or linear layer: numbers of weights, biases and output channels; MACs of one forward."""

    name: str
    weights: int
    biases: int
    channels: int
    macs: int
    edge: bool


@dataclass(frozen=True)
class NetworkCost:
    """A network by its layers. other_parameters: norms and embeddings; attention_macs: of QK^T and AV.

    The papers' OPs leave attention_macs out (the 96.0 G of LDM-4 are its convs and linears alone).
    """

    layers: list[LayerCost]
    other_parameters: int
    attention_macs: int


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


@dataclass(frozen=True)
class Operations:
    """Of one forward of one image. ops = bops / 64 + flops (Eq. 17)."""

    bops: int
    flops: int
    ops: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ops", self.bops / 64 + self.flops)


def network_cost(unet: nn.Module, inputs: Mapping[str, torch.Tensor]) -> NetworkCost:
    """Count every Conv2d and Linear in one forward `unet(**inputs)`; network and inputs on the meta device."""
    shapes: dict[str, torch.Size] = {}
    modules = {name: m for name, m in unet.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}

    def keep(name: str):
        def hook(module: nn.Module, args: tuple, result: torch.Tensor) -> None:
            if name in shapes:
                raise ValueError(f"layer {name} runs twice in one forward")
            shapes[name] = result.shape

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        with torch.no_grad():
            unet(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if unused := modules.keys() - shapes.keys():
        raise ValueError(f"layers that the forward does not reach: {sorted(unused)}")
    layers = [_layer_cost(name, module, shapes[name]) for name, module in modules.items()]
    total = sum(p.numel() for p in unet.parameters())
    attention = sum(
        2 * shapes[name].numel() * shapes[f"{name.removesuffix('q')}k"][1]  # [N, L, D] each: 2 N L L' D
        for name in modules
        if name.endswith(".to_q")
    )
    return NetworkCost(layers, total - sum(layer.weights + layer.biases for layer in layers), attention)


def _layer_cost(name: str, module: nn.Conv2d | nn.Linear, shape: torch.Size) -> LayerCost:
    """Every output number takes as many MACs as the layer has weights per output channel."""
    weights, channels = module.weight.numel(), module.weight.shape[0]
    biases = 0 if module.bias is None else module.bias.numel()
    return LayerCost(name, weights, biases, channels, shape.numel() * (weights // channels), name in EDGES)


def model_size_mb(cost: NetworkCost, bits: Bits) -> float:
    """MiB: weights at their bits; biases, norms and embeddings in fp32; without scales (see scales_mb)."""
    total = sum(layer.weights * bits.of(layer)[0] + layer.biases * FP_BITS for layer in cost.layers)
    return (total + cost.other_parameters * FP_BITS) / 8 / MIB


def scales_mb(cost: NetworkCost, bits: Bits) -> float:
    """MiB of the fp32 scales: one per output channel of quantized weights, one per layer of quantized activations."""
    scales = 0
    for layer in cost.layers:
        weight, activation = bits.of(layer)
        scales += layer.channels * (weight < FP_BITS) + (activation < FP_BITS)
    return scales * FP_BITS / 8 / MIB


def operations(cost: NetworkCost, bits: Bits) -> Operations:
    """BOPs = sum of MACs * b_w * b_a (Eq. 16). With a 32-bit operand on either side a MAC is one FLOP instead."""
    bops = flops = 0
    for layer in cost.layers:
        weight, activation = bits.of(layer)
        if FP_BITS in (weight, activation):
            flops += layer.macs
        else:
            bops += layer.macs * weight * activation
    return Operations(bops, flops)
