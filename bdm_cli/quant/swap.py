"""Which layer stands where in a U-Net, and swapping layers for quantized ones in place."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bdm_cli.quant.layers import Parts, QuantAttnProcessor, QuantConv2d, QuantLinear

EDGES = ("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2")
"""The layers next to input and output (the four special layers of the released code)."""


@dataclass(frozen=True)
class Block:
    """One timestep block (CompVis's TimestepEmbedSequential): the modules it consists of, the last makes its output."""

    index: int
    modules: tuple[str, ...]

    @property
    def output(self) -> str:
        return self.modules[-1]


def timestep_blocks(unet: nn.Module) -> list[Block]:
    """The papers' unit of counting, in order: conv_in; each (resnet, attention) pair and each downsampler; the mid
    block; each (resnet, attention, upsampler) group. LDM-4: 12 + 1 + 12 = 25, LDM-8: 31."""
    groups: list[tuple[str, ...]] = [("conv_in",)]
    for path, down in _children(unet.down_blocks, "down_blocks"):
        groups += [tuple(pair) for pair in _pairs(path, down)]
        groups += [(name,) for name, _ in _children(getattr(down, "downsamplers", None), f"{path}.downsamplers")]
    groups.append(("mid_block",))
    for path, up in _children(unet.up_blocks, "up_blocks"):
        pairs = _pairs(path, up)
        pairs[-1] += [name for name, _ in _children(getattr(up, "upsamplers", None), f"{path}.upsamplers")]
        groups += [tuple(pair) for pair in pairs]
    return [Block(index, modules) for index, modules in enumerate(groups)]


def _children(modules: nn.ModuleList | None, path: str) -> list[tuple[str, nn.Module]]:
    return [(f"{path}.{i}", module) for i, module in enumerate(modules or ())]


def _pairs(path: str, block: nn.Module) -> list[list[str]]:
    pairs = [[name] for name, _ in _children(block.resnets, f"{path}.resnets")]
    for pair, (name, _) in zip(
        pairs, _children(getattr(block, "attentions", None), f"{path}.attentions"), strict=False
    ):
        pair.append(name)
    return pairs


@dataclass(frozen=True)
class Site:
    """Where a layer stands: its dotted name and its timestep block (None for the time embedding and conv_out)."""

    name: str
    block: int | None
    n_blocks: int

    @property
    def edge(self) -> bool:
        return self.name in EDGES

    def region(self, scope: int) -> str:
        """edge, head, tail or body, where head and tail are the first and last `scope` timestep blocks.

        The blocks from both ends up to the mid block can be chosen; the mid block is always body.
        """
        if self.edge or self.block is None:
            return "edge"
        half = self.n_blocks // 2
        if self.block < min(scope, half):
            return "head"
        return "tail" if self.block >= self.n_blocks - min(scope, half) else "body"

    @property
    def skip(self) -> bool:
        """Whether it is the 1x1 conv on a ResBlock's shortcut."""
        return self.name.endswith(".conv_shortcut")

    @property
    def projection(self) -> bool:
        """Whether it is an attention's q, k, v or output (CompVis: 1-d convs)."""
        return ".to_" in self.name

    @property
    def embedding(self) -> bool:
        """Whether it brings the time embedding into a ResBlock (CompVis: emb_layers)."""
        return self.name.endswith(".time_emb_proj")

    @property
    def middle(self) -> bool:
        return self.block == self.n_blocks // 2


def sites(unet: nn.Module) -> list[tuple[Site, nn.Conv2d | nn.Linear]]:
    """Every Conv2d and Linear of a U-Net with its site, each once, in registration order."""
    blocks = timestep_blocks(unet)
    found = []
    for name, module in unet.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            block = next((b.index for b in blocks if any(f"{name}.".startswith(f"{m}.") for m in b.modules)), None)
            found.append((Site(name, block, len(blocks)), module))
    return found


def meta_inputs(unet: nn.Module) -> dict[str, Tensor]:
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


def swap_layers_(unet: nn.Module, make: Callable[[nn.Conv2d | nn.Linear, Site], Parts | None]) -> None:
    """Replace every Conv2d and Linear in place by its quantized subclass.

    make(layer, site) returns what the layer gets, or None to leave it as it is. A layer that is registered under
    several names (diffusers' samplers) is replaced under each.
    """
    replacement: dict[nn.Module, nn.Module] = {}
    for site, layer in sites(unet):
        parts = make(layer, site)
        if parts is not None:
            kind = QuantConv2d if isinstance(layer, nn.Conv2d) else QuantLinear
            replacement[layer] = kind(layer, parts).train(layer.training)
    replace_(unet, replacement)


def replace_(unet: nn.Module, replacement: Mapping[nn.Module, nn.Module]) -> None:
    """Put other modules in the place of some, under every name that they have."""
    for parent in list(unet.modules()):
        for name, child in parent._modules.items():
            if child in replacement:
                parent._modules[name] = replacement[child]


def swap_attention_(unet: nn.Module, make: Callable[[str, Site], nn.Module]) -> None:
    """Give every attention of the U-Net a QuantAttnProcessor; make(operand, site) returns the quantizer of one operand.

    operand: 'q', 'k', 'probabilities' or 'v'.
    """
    of_layer = {site.name: site for site, _ in sites(unet)}
    for name, module in list(unet.named_modules()):
        if hasattr(module, "set_processor") and hasattr(module, "to_q"):
            site = of_layer[f"{name}.to_q"]
            module.set_processor(QuantAttnProcessor(*(make(part, site) for part in ("q", "k", "probabilities", "v"))))


def quantized_layers(unet: nn.Module) -> Iterator[tuple[str, QuantConv2d | QuantLinear]]:
    """The swapped layers with their dotted names."""
    for name, module in unet.named_modules():
        if isinstance(module, QuantConv2d | QuantLinear):
            yield name, module


# ---- what depends on more than one call's input --------------------------------------------------------------------


class Timed:
    """Mixin of modules that depend on the timestep: `timestep` is that of each image of this call, [N] (or [1]), once
    tell_time_ has been called on their U-Net."""

    timestep: Tensor | None = None


def tell_time_(unet: nn.Module) -> None:
    """Let every Timed module of the U-Net, or of a copy of it, read the timestep of each call."""
    unet.register_forward_pre_hook(_tell, with_kwargs=True)


def _tell(unet: nn.Module, arguments: tuple, options: dict) -> None:
    timestep = torch.as_tensor(options["timestep"] if "timestep" in options else arguments[1]).reshape(-1)
    for module in unet.modules():
        if isinstance(module, Timed):
            module.timestep = timestep


class Remembering:
    """Mixin of modules that keep something from one call of a sampler to its next."""

    def forget(self) -> None:
        """Drop what was kept: the next call begins a new trajectory."""
        raise NotImplementedError


def begin_trajectory_(unet: nn.Module) -> None:
    """To be called before the first call of every sampling: what was kept of another one is dropped."""
    for module in unet.modules():
        if isinstance(module, Remembering):
            module.forget()
