"""Timestep blocks, sites and swapped layers, on the papers' network definitions and on small ones."""

import copy
import logging
from collections.abc import Iterator

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import nn

from bdm_cli import recipe
from bdm_cli.diffusion.models import build_unet
from bdm_cli.quant.layers import Parts, QuantAttnProcessor, QuantConv2d, QuantLinear
from bdm_cli.quant.quantizers import Lsq, SignWeight
from bdm_cli.quant.swap import EDGES, Site, quantized_layers, sites, swap_attention_, swap_layers_, timestep_blocks

# reference/checkpoints.md 5.3, input_blocks 0-11, middle_block, output_blocks 0-11
LDM4 = [
    ("conv_in",),
    ("down_blocks.0.resnets.0",),
    ("down_blocks.0.resnets.1",),
    ("down_blocks.0.downsamplers.0",),
    ("down_blocks.1.resnets.0", "down_blocks.1.attentions.0"),
    ("down_blocks.1.resnets.1", "down_blocks.1.attentions.1"),
    ("down_blocks.1.downsamplers.0",),
    ("down_blocks.2.resnets.0", "down_blocks.2.attentions.0"),
    ("down_blocks.2.resnets.1", "down_blocks.2.attentions.1"),
    ("down_blocks.2.downsamplers.0",),
    ("down_blocks.3.resnets.0", "down_blocks.3.attentions.0"),
    ("down_blocks.3.resnets.1", "down_blocks.3.attentions.1"),
    ("mid_block",),
    ("up_blocks.0.resnets.0", "up_blocks.0.attentions.0"),
    ("up_blocks.0.resnets.1", "up_blocks.0.attentions.1"),
    ("up_blocks.0.resnets.2", "up_blocks.0.attentions.2", "up_blocks.0.upsamplers.0"),
    ("up_blocks.1.resnets.0", "up_blocks.1.attentions.0"),
    ("up_blocks.1.resnets.1", "up_blocks.1.attentions.1"),
    ("up_blocks.1.resnets.2", "up_blocks.1.attentions.2", "up_blocks.1.upsamplers.0"),
    ("up_blocks.2.resnets.0", "up_blocks.2.attentions.0"),
    ("up_blocks.2.resnets.1", "up_blocks.2.attentions.1"),
    ("up_blocks.2.resnets.2", "up_blocks.2.attentions.2", "up_blocks.2.upsamplers.0"),
    ("up_blocks.3.resnets.0",),
    ("up_blocks.3.resnets.1",),
    ("up_blocks.3.resnets.2",),
]


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return build_unet(recipe.load(name).unet)


@pytest.fixture(scope="module")
def ldm4() -> nn.Module:
    return on_meta("bedrooms")


@pytest.fixture
def tiny(tiny_recipe) -> nn.Module:
    torch.manual_seed(0)
    return build_unet(tiny_recipe().unet).eval()


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return torch.randn(2, 1, 8, 8, generator=random), torch.tensor([3, 700])


def test_the_timestep_blocks_of_ldm4(ldm4: nn.Module):
    blocks = timestep_blocks(ldm4)
    assert [block.modules for block in blocks] == LDM4
    assert [block.index for block in blocks] == list(range(25))
    assert [block.output for block in blocks] == [modules[-1] for modules in LDM4]


@pytest.mark.parametrize(
    ("name", "blocks"), [("churches", 31), ("cifar10", 25), ("ffhq", 25), ("imagenet", 25), ("digits", 13)]
)
def test_the_number_of_timestep_blocks(name: str, blocks: int):
    unet = on_meta(name)
    found = timestep_blocks(unet)
    assert len(found) == blocks
    assert found[blocks // 2].modules == ("mid_block",)
    for module in (name for block in found for name in block.modules):
        unet.get_submodule(module)  # raises if there is none


@pytest.mark.parametrize("name", ["bedrooms", "churches", "cifar10", "ffhq", "imagenet", "digits"])
def test_every_layer_stands_in_a_block_or_at_an_edge(name: str):
    found = sites(on_meta(name))
    assert [site.name for site, _ in found if site.edge] == [
        "conv_in", "time_embedding.linear_1", "time_embedding.linear_2", "conv_out"
    ]  # fmt: skip
    assert {site.name for site, _ in found if site.block is None} == set(EDGES) - {"conv_in"}


def test_ebb_at_scope_6_takes_the_papers_share_of_ldm4(ldm4: nn.Module):
    """methods.md 2.2: 49 layers of the original, whose qkv is one layer; here it is three, in each of the five
    attentions within the scope (blocks 4, 5, 19, 20, 21). 14.5 % of the weights, 14.9 % with the special layers."""
    found = sites(ldm4)
    chosen = [(site, layer) for site, layer in found if site.region(6) in ("head", "tail")]
    assert {site.block for site, _ in chosen} == {1, 2, 3, 4, 5, 19, 20, 21, 22, 23, 24}
    assert sum(site.name.endswith(".to_q") for site, _ in chosen) == 5
    assert len(chosen) == 49 + 2 * 5
    weights = sum(layer.weight.numel() for _, layer in chosen)
    edges = sum(layer.weight.numel() for site, layer in found if site.edge)
    assert weights == 39_839_744
    assert sum(layer.weight.numel() for _, layer in found) == 273_872_704
    assert weights / 273_872_704 == pytest.approx(0.14547, abs=1e-5)
    assert (weights + edges) / 273_872_704 == pytest.approx(0.14918, abs=1e-5)
    assert weights / sum(p.numel() for p in ldm4.parameters()) == pytest.approx(0.14537, abs=1e-5)


def test_regions_of_ldm4(ldm4: nn.Module):
    of = {site.name: site for site, _ in sites(ldm4)}
    assert of["conv_in"].region(6) == of["conv_out"].region(6) == of["time_embedding.linear_1"].region(6) == "edge"
    assert of["down_blocks.1.attentions.1.to_k"].region(6) == "head"
    assert of["down_blocks.1.downsamplers.0.conv"].region(6) == "body"
    assert of["up_blocks.1.upsamplers.0.conv"].region(6) == "body"
    assert of["up_blocks.2.resnets.0.conv1"].region(6) == "tail"
    assert of["mid_block.resnets.0.conv1"].middle
    assert not of["up_blocks.0.resnets.0.conv1"].middle


@pytest.mark.parametrize("n_blocks", [13, 25, 31])
def test_scope_counts_blocks_from_both_ends_and_never_takes_the_middle(n_blocks: int):
    half = n_blocks // 2
    for scope in range(n_blocks + 2):
        regions = [Site("layer", block, n_blocks).region(scope) for block in range(n_blocks)]
        count = min(scope, half)
        assert regions == ["head"] * count + ["body"] * (n_blocks - 2 * count) + ["tail"] * count
        assert regions[half] == "body"


def test_a_layer_under_two_names_is_swapped_under_both(tiny: nn.Module):
    resnet = tiny.down_blocks[0].resnets[0]
    resnet.again = resnet.conv1
    nothing = nn.Conv2d(1, 1, 1)
    resnet.spare = None
    swap_layers_(tiny, lambda layer, site: Parts(SignWeight(layer.weight)))
    assert isinstance(resnet.conv1, QuantConv2d)
    assert resnet.again is resnet.conv1
    assert sum(module is resnet.conv1 for module in tiny.modules()) == 1
    assert not any(type(module) in (nn.Conv2d, nn.Linear) for module in tiny.modules())
    assert type(nothing) is nn.Conv2d


def test_swapped_layers_keep_parameters_and_state_dict_keys(tiny: nn.Module):
    before = dict(tiny.named_parameters())
    swap_layers_(tiny, lambda layer, site: Parts(SignWeight(layer.weight), Lsq(4)))
    after = dict(tiny.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    added = {name.rsplit(".", 2)[1:][0] for name in after.keys() - before.keys()}
    assert added == {"weight_quantizer", "activation_quantizer"}
    assert set(before) <= set(tiny.state_dict())


def test_none_leaves_a_layer_and_the_training_mode_is_kept(tiny: nn.Module):
    tiny.train()
    tiny.conv_in.eval()
    swap_layers_(tiny, lambda layer, site: None if site.name == "conv_out" else Parts())
    assert type(tiny.conv_out) is nn.Conv2d
    assert not tiny.conv_in.training
    assert tiny.time_embedding.linear_1.training
    names = [name for name, _ in quantized_layers(tiny)]
    assert "conv_out" not in names
    assert len(names) == len(set(names)) == len(sites(tiny)) - 1


@torch.no_grad()
def test_layers_without_quantizers_equal_the_original_bit_for_bit(tiny: nn.Module):
    x, t = inputs()
    before = tiny(x, t)[0]
    swap_layers_(tiny, lambda layer, site: Parts())
    assert len(list(quantized_layers(tiny))) == len(sites(tiny)) > 40
    assert torch.equal(tiny(x, t)[0], before)


CONVS = [
    nn.Conv2d(4, 6, 3, padding=1),
    nn.Conv2d(4, 6, 3, stride=2, bias=False),
    nn.Conv2d(4, 6, (1, 3), dilation=2, groups=2, padding="same"),
    nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
]


@pytest.mark.parametrize("conv", CONVS, ids=lambda conv: conv.extra_repr())
def test_a_conv_of_any_form_is_the_same_conv(conv: nn.Conv2d):
    x = torch.randn(2, 4, 9, 9)
    swapped = QuantConv2d(conv, Parts())
    assert torch.equal(swapped(x), conv(x))
    assert swapped.weight is conv.weight
    assert swapped.extra_repr() == conv.extra_repr()


def test_quantized_layers_compute_on_quantized_operands():
    torch.manual_seed(0)
    conv, linear = nn.Conv2d(3, 5, 3, padding=1), nn.Linear(6, 4)
    for layer, kind, x in ((conv, QuantConv2d, torch.randn(2, 3, 7, 7)), (linear, QuantLinear, torch.randn(2, 6))):
        weights, activations = SignWeight(layer.weight), Lsq(4)
        activations.calibrate_(x)
        reference = copy.deepcopy(layer)
        reference.weight.data = weights(layer.weight).detach()
        assert torch.equal(kind(layer, Parts(weights, activations))(x), reference(activations(x)))


class Named(nn.Identity):
    """A pass-through quantizer that says what it stands for."""

    def __init__(self, operand: str, site: Site) -> None:
        super().__init__()
        self.operand, self.site = operand, site


@pytest.fixture
def diffusers_warnings() -> Iterator[list[str]]:
    """What diffusers logs as warnings meanwhile (its loggers do not propagate)."""
    texts: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: texts.append(record.getMessage())
    logger = logging.getLogger("diffusers")
    logger.addHandler(handler)
    yield texts
    logger.removeHandler(handler)


@torch.no_grad()
def test_attention_with_pass_through_quantizers_equals_diffusers(tiny: nn.Module):
    x, t = inputs()
    before = tiny(x, t)[0]
    swap_attention_(tiny, Named)
    processors = {name: m for name, m in tiny.named_modules() if isinstance(m, QuantAttnProcessor)}
    assert sorted(processors) == [
        f"{attention}.processor"
        for attention in (
            "down_blocks.1.attentions.0",
            "mid_block.attentions.0",
            "up_blocks.1.attentions.0",
            "up_blocks.1.attentions.1",
        )
    ]
    for name, processor in processors.items():
        parts = (
            processor.q_quantizer, processor.k_quantizer, processor.probability_quantizer, processor.v_quantizer
        )  # fmt: skip
        assert [part.operand for part in parts] == ["q", "k", "probabilities", "v"]
        assert {part.site.name for part in parts} == {name.replace(".processor", ".to_q")}
    torch.testing.assert_close(tiny(x, t)[0], before, rtol=0, atol=1e-5)


@torch.no_grad()
def test_quantized_attention_does_not_warn_at_every_forward(tiny: nn.Module, diffusers_warnings: list[str]):
    tiny(*inputs())
    assert diffusers_warnings == []
    swap_attention_(tiny, Named)
    tiny(*inputs())
    assert diffusers_warnings == []


@torch.no_grad()
def test_attention_of_a_network_with_fixed_heads_equals_diffusers(tiny_recipe):
    torch.manual_seed(0)
    spec = tiny_recipe().unet
    unet = build_unet(spec.model_copy(update={"heads": 4})).eval()
    assert unet.mid_block.attentions[0].heads == 4
    before = unet(*inputs())[0]
    swap_attention_(unet, Named)
    torch.testing.assert_close(unet(*inputs())[0], before, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("context", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_cross_attention_equals_diffusers(context: bool, residual: bool):
    torch.manual_seed(0)
    attention = Attention(
        query_dim=16,
        cross_attention_dim=12 if context else None,
        heads=4,
        dim_head=8,
        residual_connection=residual,
        rescale_output_factor=1.5,
        processor=AttnProcessor(),
    ).eval()
    x, other = torch.randn(2, 9, 16), torch.randn(2, 5, 12) if context else None
    before = attention(x, encoder_hidden_states=other)
    attention.set_processor(QuantAttnProcessor(*(nn.Identity() for _ in range(4))))
    torch.testing.assert_close(attention(x, encoder_hidden_states=other), before, rtol=0, atol=1e-5)


def test_attention_quantizes_each_of_the_four_operands():
    """Against softmax attention written out, with a different step for each operand."""
    torch.manual_seed(0)
    attention = Attention(query_dim=8, heads=2, dim_head=4, processor=AttnProcessor()).eval()
    steps = (0.11, 0.07, 0.05, 0.2)
    quantizers = [Lsq(8) for _ in steps]
    for quantizer, step in zip(quantizers, steps, strict=True):
        quantizer.scale.data.fill_(step)
    attention.set_processor(QuantAttnProcessor(*quantizers))
    x = torch.randn(3, 6, 8)

    def rounded(values: torch.Tensor, step: float) -> torch.Tensor:
        return (values.double() / step).round().clamp(-128, 127) * step

    with torch.no_grad():
        q, k, v = (
            layer(x).view(3, 6, 2, 4).transpose(1, 2) for layer in (attention.to_q, attention.to_k, attention.to_v)
        )
        scores = rounded(q * 4**-0.25, steps[0]) @ rounded(k * 4**-0.25, steps[1]).transpose(-1, -2)
        mixed = rounded(scores.float().softmax(-1), steps[2]) @ rounded(v, steps[3])
        expected = attention.to_out[0](mixed.float().transpose(1, 2).reshape(3, 6, 8))
        torch.testing.assert_close(attention(x), expected, rtol=0, atol=1e-5)


def test_attention_refuses_what_it_does_not_compute():
    attention = Attention(query_dim=8, heads=2, dim_head=4)
    attention.set_processor(QuantAttnProcessor(*(nn.Identity() for _ in range(4))))
    with pytest.raises(ValueError, match="no mask"):
        attention(torch.randn(1, 3, 8), attention_mask=torch.zeros(2, 1, 3))


def test_a_copied_network_does_not_feed_its_original(tiny: nn.Module):
    swap_layers_(tiny, lambda layer, site: Parts(SignWeight(layer.weight), Lsq(8)))
    for module in tiny.modules():
        if isinstance(module, Lsq):
            module.scale.data.fill_(0.1)
    twin = copy.deepcopy(tiny)
    with torch.no_grad():
        assert torch.equal(tiny(*inputs())[0], twin(*inputs())[0])
        for parameter in twin.parameters():
            parameter.zero_()
    assert all(parameter.abs().sum() > 0 for name, parameter in tiny.named_parameters() if name.endswith("sigma"))


def test_diffusers_networks_are_what_the_counts_rest_on(ldm4: nn.Module):
    assert isinstance(ldm4, UNet2DModel)
    assert sum(parameter.numel() for parameter in ldm4.parameters()) == 274_056_163
