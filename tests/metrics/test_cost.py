"""Sizes and operations: by hand on small networks, and the papers' numbers on the real ones (methods.md, 1.5-1.6)."""

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

from bdm_cli import recipe
from bdm_cli.diffusion.models import build_unet
from bdm_cli.methods import METHODS, outline
from bdm_cli.methods.base import Method
from bdm_cli.methods.bidm import BiDm
from bdm_cli.metrics import cost as costs
from bdm_cli.metrics.cost import (
    Bits,
    Built,
    Structure,
    bill,
    bill_as_built,
    main_bits,
    model_size_mb,
    network_cost,
    of_student,
    of_unet,
    operations,
    scales_mb,
    student_cost,
    total,
)
from bdm_cli.paper import tables
from bdm_cli.quant.frames import Frame
from bdm_cli.quant.layers import Parts
from bdm_cli.quant.quantizers import EbbWeight, Grid, Lsq, MeanSignWeight, Quantizer, SignActivation, lsq_weight
from bdm_cli.quant.swap import Timed, swap_attention_, swap_layers_

LDM_4 = {
    "sample_size": 64,
    "freq_shift": 0,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "attention_head_dim": 32,
}
LDM_8 = {
    "sample_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "freq_shift": 0,
    "down_block_types": (*["AttnDownBlock2D"] * 4, "DownBlock2D"),
    "up_block_types": ("ResnetUpsampleBlock2D", *["AttnUpBlock2D"] * 4),
    "block_out_channels": (192, 384, 384, 768, 768),
    "layers_per_block": 2,
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "attention_head_dim": 24,
    "attn_norm_num_groups": 32,
    "resnet_time_scale_shift": "scale_shift",
}


def cost(kind=UNet2DModel, **arguments):
    with torch.device("meta"):
        return network_cost(kind(**arguments))


@pytest.fixture(scope="module")
def ldm_4():
    return cost(**LDM_4)


@pytest.fixture(scope="module")
def ldm_8():
    return cost(**LDM_8)


def test_a_small_network_by_hand():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.down_blocks = self.up_blocks = nn.ModuleList()
            self.conv_in = nn.Conv2d(3, 8, 3, stride=2, padding=1)
            self.middle = nn.Conv2d(8, 6, 3, padding=1, groups=2, bias=False)
            self.norm = nn.GroupNorm(2, 6)
            self.linear = nn.Linear(6, 5)

        def forward(self, sample):
            return self.linear(self.norm(self.middle(self.conv_in(sample))).permute(0, 2, 3, 1))

    with torch.device("meta"):
        found = network_cost(Small(), {"sample": torch.empty(1, 3, 10, 10)})
    edge, middle, linear = found.layers
    assert (edge.name, edge.edge, middle.edge) == ("conv_in", True, False)
    assert (edge.weights, edge.biases, edge.macs) == (216, 8, 25 * 216)
    assert (middle.weights, middle.biases, middle.macs) == (6 * 4 * 9, 0, 25 * 216)
    assert (linear.weights, linear.biases, linear.macs) == (30, 5, 25 * 30)
    assert [(layer.kind, layer.shape) for layer in found.layers] == [
        ("conv", (8, 3, 3, 3)),
        ("conv", (6, 4, 3, 3)),
        ("linear", (5, 6)),
    ]
    assert [(layer.inputs, layer.outputs) for layer in found.layers] == [(300, 200), (200, 150), (150, 125)]
    assert (found.other_parameters, found.attention_macs) == (12, 0)

    bits = Bits(weight=1, activation=4, edge=8)
    assert model_size_mb(found, bits) * 2**20 == pytest.approx((216 * 8 + 246 * 1 + (8 + 5 + 12) * 32) / 8)
    assert scales_mb(found, bits) * 2**20 == pytest.approx(4 * (8 + 6 + 5 + 3))
    count = operations(found, bits)
    assert count.bops == 5400 * 64 + (5400 + 750) * 4
    assert count.flops == 0
    assert count.ops == pytest.approx(5400 + 6150 / 16)

    real_inputs = Bits(weight=1, activation=32, edge=8)
    assert scales_mb(found, real_inputs) * 2**20 == pytest.approx(4 * (8 + 6 + 5))
    assert operations(found, real_inputs).ops == operations(found, Bits()).ops == 5400 + 6150
    assert scales_mb(found, Bits()) == 0

    parts = bill(found, bits)
    assert [part.name for part in parts] == ["conv_in", "middle", "linear", "norm"]
    assert [part.bits for part in parts] == [(8, 8), (1, 4), (1, 4), None]
    assert [part.size_bits for part in parts] == [216 * 8 + 8 * 32, 216, 30 + 5 * 32, 12 * 32]
    assert [(part.bops, part.flops) for part in parts] == [(5400 * 64, 0), (5400 * 4, 0), (750 * 4, 0), (0, 0)]
    all_scales = total(bill(found, bits, scales="all"))
    assert all_scales.flops == 200 + 150 + 125  # one multiplication per output number
    assert all_scales.size_mb == pytest.approx(model_size_mb(found, bits) + scales_mb(found, bits))
    assert total(bill(found, bits, scales="paper")).flops == 0

    two = total(bill(found, bits, Structure("high-order"), scales="all"))
    assert two.size_bits == 216 * 8 + 246 * 2 + (8 + 5 + 12) * 32 + (8 + 2 * 6 + 2 * 5 + 3) * 32
    assert two.bops == 5400 * 64 + 2 * (5400 + 750) * 4
    assert two.flops == 200 + 2 * (150 + 125)
    assert total(bill(found, real_inputs, Structure("high-order"))).ops == 5400 + 6150  # the bases add up to one weight
    assert bill(found, Bits(2, 4, 8), Structure("high-order")) == bill(found, Bits(2, 4, 8))


TINY = {
    "sample_size": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "attention_head_dim": 32,
}


def test_blocks_and_regions_of_a_small_unet():
    """conv_in, 2 pairs and a downsampler, the middle, 2 pairs twice (the first path's last with its upsampler)."""
    found = cost(**TINY)
    assert len(found.blocks) == 9
    where = {layer.name: layer.site.block for layer in found.layers}
    assert where["conv_in"] == 0
    assert where["down_blocks.1.attentions.0.to_q"] == 3
    assert where["mid_block.resnets.0.conv1"] == 4
    assert where["conv_out"] is None
    others = {other.name: other.block for other in found.others}
    assert others["down_blocks.0.resnets.0.norm1"] == 1
    assert others["conv_norm_out"] is None
    both = total(bill(found, Bits(1, 4), Structure("lmb", scope=3)))
    plain = {part.name: part for part in bill(found, Bits(1, 4))}
    doubled = [name for name, block in where.items() if block in (1, 2, 6, 7, 8)]
    assert both.bops == sum(part.bops * (1 + (name in doubled)) for name, part in plain.items())
    assert bill(found, Bits(1, 4), Structure("lmb", scope=0)) == list(plain.values())
    with_all = total(bill(found, Bits(1, 4), Structure("lmb", scope=9)))
    assert with_all.bops < total(bill(found, Bits(1, 4), Structure("high-order"))).bops  # the middle keeps one basis


def test_attentions_count_in_full_precision_when_asked():
    found = cost(**TINY)
    without, counted = total(bill(found, Bits(1, 4))), total(bill(found, Bits(1, 4), attention=True))
    assert counted.flops - without.flops == found.attention_macs == sum(a.macs for a in found.attentions) > 0
    assert counted.bops == without.bops
    assert counted.size_bits == without.size_bits


def test_scales_of_the_papers_rule_leave_out_the_projections():
    found = cost(**TINY)
    bits = Bits(1, 4)
    inner = [layer for layer in found.layers if not layer.edge]
    assert {layer.name.split(".")[-1] for layer in inner if layer.kind == "projection"} == {"to_q", "to_k", "to_v", "0"}
    expected = sum(layer.channels + 1 for layer in inner if layer.kind != "projection")
    assert total(bill(found, bits, scales="paper")).size_bits - total(bill(found, bits)).size_bits == 32 * expected


def test_bidm_as_its_paper_counts():
    found = cost(**TINY)
    parts = {part.name: part for part in bill(found, Bits(1, 1), Structure("bidm-paper"))}
    plain = {part.name: part for part in bill(found, Bits(1, 1))}
    changed = {name for name, part in parts.items() if part != plain[name]}
    assert changed == {layer.name for layer in found.layers if layer.name.endswith("conv_shortcut")}
    assert all(parts[name].size_bits == plain[name].size_bits for name in changed)
    assert all((parts[name].bops, parts[name].flops) == (0, plain[name].bops) for name in changed)


def test_structures_and_scales_that_do_not_exist():
    found = cost(**TINY)
    with pytest.raises(ValueError, match="structure 'bidm-paper' is for 1/1, not for 1/4"):
        bill(found, Bits(1, 4), Structure("bidm-paper"))
    with pytest.raises(ValueError, match="'triple' does not exist"):
        bill(found, Bits(1, 4), Structure("triple"))
    with pytest.raises(ValueError, match="scales 'some'"):
        bill(found, Bits(1, 4), scales="some")


def test_a_layer_must_run_exactly_once():
    class Twice(nn.Module):
        def __init__(self, runs):
            super().__init__()
            self.down_blocks = self.up_blocks = nn.ModuleList()
            self.conv, self.runs = nn.Conv2d(1, 1, 1), runs

        def forward(self, sample):
            for _ in range(self.runs):
                sample = self.conv(sample)
            return sample

    for runs, text in ((0, "does not reach: \\['conv'\\]"), (2, "conv runs twice")):
        with pytest.raises(ValueError, match=text), torch.device("meta"):
            network_cost(Twice(runs), {"sample": torch.empty(1, 1, 4, 4)})


def test_attention_products_by_hand():
    """One attention at 4x4 with 32 channels in the mid block: QK^T and AV are 16 * 16 * 32 MACs each."""
    found = cost(
        sample_size=8,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 32),
        layers_per_block=1,
    )
    assert found.attention_macs == 2 * 16 * 16 * 32


def test_cross_attention_counts_the_context():
    """8x8 positions look at themselves (64 keys) and at one token."""
    found = cost(
        UNet2DConditionModel,
        sample_size=8,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownBlock2D",),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("UpBlock2D",),
        block_out_channels=(32,),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=1,
    )
    assert found.attention_macs == 2 * 64 * 32 * (64 + 1)


def test_ldm_4_layers(ldm_4):
    assert sum(layer.weights for layer in ldm_4.layers) == pytest.approx(273.87e6, abs=1e4)
    edges = [layer for layer in ldm_4.layers if layer.edge]
    assert len(edges) == 4
    assert sum(layer.weights for layer in edges) == pytest.approx(1.016e6, abs=1e3)
    assert sum(layer.macs for layer in edges) == pytest.approx(0.051e9, abs=1e6)
    assert ldm_4.attention_macs == pytest.approx(5.18e9, abs=1e7)


def test_ldm_8_layers(ldm_8):
    assert sum(layer.weights for layer in ldm_8.layers) == pytest.approx(294.74e6, abs=1e4)
    edges = [layer for layer in ldm_8.layers if layer.edge]
    assert sum(layer.weights for layer in edges) == pytest.approx(0.751e6, abs=1e3)
    assert sum(layer.macs for layer in edges) == pytest.approx(0.015e9, abs=1e6)
    assert ldm_8.attention_macs == pytest.approx(2.28e9, abs=1e7)


@pytest.mark.parametrize(
    ("bits", "size", "ops"),
    [
        (Bits(), 1045.4, 96.02),
        (Bits(8, 8, 32), 264.8, 96.02),
        (Bits(4, 4, 32), 134.7, 24.04),
        (Bits(2, 4, 32), 69.6, 12.05),
        (Bits(1, 4, 32), 37.1, 6.05),
        (Bits(8, 8, 8), 261.9, 96.02),
        (Bits(4, 4, 8), 131.8, 24.04),
        (Bits(2, 4, 8), 66.7, 12.05),
        (Bits(1, 4, 8), 34.2, 6.05),
    ],
)
def test_ldm_4_at_the_papers_bits(ldm_4, bits, size, ops):
    assert round(model_size_mb(ldm_4, bits), 1) == size
    assert round(operations(ldm_4, bits).ops / 1e9, 2) == ops


@pytest.mark.parametrize(
    ("bits", "size"), [(Bits(), 1125.2), (Bits(4, 4, 32), 143.9), (Bits(2, 4, 32), 73.8), (Bits(1, 4, 32), 38.8)]
)
def test_ldm_8_at_the_papers_bits(ldm_8, bits, size):
    assert round(model_size_mb(ldm_8, bits), 1) == size


def test_ldm_8_operations_and_ldm_4_scales(ldm_4, ldm_8):
    assert round(operations(ldm_8, Bits()).ops / 1e9, 2) == 18.64
    assert round(scales_mb(ldm_4, Bits(1, 4, 32)), 2) == 0.36


# ---- networks as methods build them ----------------------------------------------------------------------------------


class Shift(Frame):
    """x + b before, gamma times the input behind; the second table is for the training alone."""

    def __init__(self, channels):
        super().__init__()
        self.b, self.gamma = nn.Parameter(torch.zeros(channels, 1, 1)), nn.Parameter(torch.zeros(1))
        self.only_trained = nn.Parameter(torch.zeros(1000))

    def operations(self, read, written):
        return read.numel() + 2 * written.numel()

    def stored(self):
        return self.b.numel() + 1


class Tabulated(Timed, Quantizer):
    """A step for every time, made by a network that only the training needs."""

    bits = 4

    def __init__(self, zeros=False, refuses=False):
        super().__init__()
        self.network, self.zeros, self.refuses = nn.Linear(1, 1000), zeros, refuses

    def grid(self, times=None):
        if self.refuses:
            raise NotImplementedError("its reason")
        step = self.network(torch.tensor(times).to(self.network.weight)[:, None]).mean(1)
        return Grid(4, 0, step.round() if self.zeros else 0, step)


class Adapted(Quantizer):
    """Merged away at inference; what is left is said by `stored`."""

    bits = 3

    def __init__(self, weight):
        super().__init__()
        self.low_rank = nn.Parameter(torch.zeros(5, *weight.shape[1:]))

    def stored(self):
        return 7


class Behind(nn.Module):
    """What a method may hang behind a block."""

    def __init__(self):
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(10))

    def forward(self, u):
        return u

    def stored(self):
        return 4

    def operations(self, read, written):
        assert read == written
        return 3 * written.numel()


def tiny(quantize_, times=(9.0, 5.0, 1.0)):
    """TINY as `quantize_` leaves it, and in full precision."""
    with torch.device("meta"):
        unet = UNet2DModel(**TINY)
        full = network_cost(unet)
        quantize_(unet)
    return student_cost(full, unet, times), full


SAME, WIDER = "down_blocks.0.resnets.0.conv1", "down_blocks.1.resnets.0.conv1"  # 32 -> 32 at 8x8, 32 -> 64 at 4x4
SKIP, QUERY = "down_blocks.1.resnets.0.conv_shortcut", "down_blocks.1.attentions.0.to_q"  # at 4x4, 64 -> 64 there
LINEAR = "down_blocks.0.resnets.0.time_emb_proj"  # 128 -> 32


def test_a_student_by_hand():
    parts = {
        SAME: lambda layer: Parts(MeanSignWeight(), SignActivation(), Shift(32), bias=False),
        WIDER: lambda layer: Parts(EbbWeight(layer.weight), Lsq(4)),
        SKIP: lambda layer: Parts(MeanSignWeight("layer"), Tabulated()),
        QUERY: lambda layer: Parts(Adapted(layer.weight), Tabulated(zeros=True)),
        LINEAR: lambda layer: Parts(lsq_weight(5, layer.weight), None),
        "conv_in": lambda layer: Parts(None, Tabulated(refuses=True)),
    }

    def quantize_(unet):
        swap_layers_(unet, lambda layer, site: parts[site.name](layer) if site.name in parts else None)
        unet.up_blocks[1].resnets[1].behind = Behind()
        unet.up_blocks[1].resnets[1].register_forward_hook(lambda block, inputs, u: block.behind(u))

    found, full = tiny(quantize_)
    layers = {layer.name: layer for layer in found.layers}
    assert [(layer.name, layer.macs) for layer in found.layers] == [(layer.name, layer.macs) for layer in full.layers]
    assert layers[SAME].built == Built(1, 1, 1, 32, 0, 33, 32 * 64 + 2 * 32 * 64)
    assert layers[SAME].biases == 0
    assert layers[WIDER].built == Built(1, 4, 2, 2 * 64, 1)
    assert layers[SKIP].built == Built(1, 4, 1, 1, 3)
    assert layers[QUERY].built == Built(3, 4, 1, 7, 6)
    assert layers[LINEAR].built == Built(5, 32, 1, 32, 0)
    assert layers["conv_in"].built == Built(32, 4, 1, 0, 3)
    untouched = layers.keys() - parts.keys()
    assert all(layers[name].built == Built() for name in untouched)
    assert [(e.numbers, e.operations, e.block) for e in found.extras] == [(4, 3 * 32 * 64, 8)]
    assert found.others == full.others

    def priced(scales):
        return {part.name: part for part in bill_as_built(found, scales)}

    none, paper, every = priced("none"), priced("paper"), priced("all")
    assert none[SAME].size_bits == 9 * 32 * 32 + 32 * 33  # what a frame stores always counts
    assert paper[SAME].size_bits - none[SAME].size_bits == 32 * 32
    assert (none[SAME].bops, none[SAME].flops, every[SAME].flops) == (9 * 32 * 32 * 64, 3 * 32 * 64, 4 * 32 * 64)
    assert every[WIDER].size_bits == 2 * 9 * 32 * 64 + 32 * (64 + 129)
    assert (every[WIDER].bops, every[WIDER].flops) == (2 * 4 * 9 * 32 * 64 * 16, 2 * 64 * 16)
    assert (every[SKIP].size_bits, every[SKIP].flops) == (32 * 64 + 32 * (64 + 4), 64 * 16)
    assert paper[QUERY].size_bits == none[QUERY].size_bits == every[QUERY].size_bits - 32 * 13  # a projection
    assert (none[LINEAR].size_bits, none[LINEAR].bops, none[LINEAR].flops) == (5 * 128 * 32 + 32 * 32, 0, 128 * 32)
    behind = none["up_blocks.1.resnets.1.behind"]
    assert (behind.kind, behind.size_bits, behind.flops, behind.block) == ("extra", 4 * 32, 3 * 32 * 64, 8)
    real = {part.name: part for part in bill(full, Bits())}
    assert all(none[name] == real[name] for name in untouched)


def test_a_layer_is_real_while_it_is_said_to_be():
    def quantize_(unet):
        Method(activation_bits=4).quantize_(unet)
        unet.conv_in.weight_is_real = unet.conv_out.input_is_real = True

    layers = {layer.name: layer for layer in tiny(quantize_)[0].layers}
    assert (layers["conv_in"].built.weight, layers["conv_in"].built.activation) == (32, 8)
    assert (layers["conv_out"].built.weight, layers["conv_out"].built.activation) == (8, 32)
    assert layers[SAME].built == Built(1, 4, 1, 32, 1)


class Normalised(Lsq):
    def operations(self, read, written):
        return 5 * read.numel()

    def grid(self, times=None):
        raise NotImplementedError("its channels have steps of their own")


def test_quantized_attentions():
    """Two attentions at 4x4 with 64 channels and 2 heads, one at 4x4 in the mid block; 16 keys each."""

    def quantize_(unet):
        swap_attention_(unet, lambda operand, site: Normalised(4) if operand == "q" else Lsq(8))

    found, full = tiny(quantize_)
    assert [a.macs for a in found.attentions] == [2 * 16 * 16 * 64] * len(full.attentions)
    assert {a.bits for a in found.attentions} == {(32, 8, 8, 8)}  # what lies on no grid is multiplied as it is
    assert {(a.scales, a.operations) for a in found.attentions} == {(4, 5 * 64 * 16)}
    n, real = len(found.attentions), total(bill(full, Bits()))
    counted, without = total(bill_as_built(found, "all", attention=True)), total(bill_as_built(found))
    assert counted.size_bits - real.size_bits == n * 4 * 32
    assert (without.size_bits, without.flops - real.flops) == (real.size_bits, n * 5 * 64 * 16)
    assert counted.bops == n * 16 * 16 * 64 * 64
    assert counted.flops - without.flops == n * 16 * 16 * 64


def test_bidm_by_hand():
    """One layer of each sort as released: what it adds to its weights' bits and its MACs."""
    method = BiDm(connections=2, filter_bias="uniform", linear_threshold="surrogate")
    method.host = recipe.load("bedrooms-w1a1-bidm")
    found, _ = tiny(method.quantize_)
    parts = {part.name: part for part in bill_as_built(found)}

    same = parts[SAME]
    assert same.size_bits == 9 * 32 * 32 + 32 * (32 + 9 + 1 + 1)  # thresholds, filter and its bias, gamma; no bias
    assert same.bops == 9 * 32 * 32 * 64
    assert same.flops == 2 * 32 * 64 + 9 * 64 + 2 * 32 * 64  # |x| and thresholds; filter; K and shortcut

    wider = parts[WIDER]  # a real 1x1 conv on the shortcut
    assert wider.size_bits == 9 * 32 * 64 + 32 * (32 + 9 + 1 + 1 + 32 * 64)
    assert wider.flops == 2 * 32 * 16 + 9 * 16 + 2 * 64 * 16 + 32 * 64 * 16

    skip = parts[SKIP]
    assert (skip.bits, skip.size_bits) == ((32, 32), 32 * (32 * 64 + 64))
    assert (skip.bops, skip.flops) == (0, 32 * 64 * 16)

    query = parts[QUERY]
    assert (query.size_bits, query.bops, query.flops) == (64 * 64 + 32 * 64, 64 * 64 * 16, 64 * 16)
    assert (parts[LINEAR].size_bits, parts[LINEAR].flops) == (128 * 32, 0)  # a surrogate's threshold is not needed
    assert parts["conv_out"].bits == (32, 32)
    mixed = [part for part in parts.values() if part.kind == "extra"]
    assert [(part.block, part.size_bits, part.flops) for part in mixed] == [
        (7, 3200, 2 * 32 * 64),
        (8, 3200, 2 * 32 * 64),
    ]


def counted(name, *overrides, scales="paper"):
    student = of_student(recipe.load(name, overrides), build_unet, outline)
    return total(bill_as_built(student, scales)), student


def test_bidm_on_ldm_4():
    """As released 111.48 MiB; with thresholds on the time embedding's linears, as the text has them, 0.08 MiB more."""
    released, _ = counted("bedrooms-w1a1-bidm", "method.linear_threshold=surrogate", "method.filter_bias=uniform")
    assert released.size_mb == pytest.approx(111.48, abs=0.005)
    assert released.bops / 1e9 == pytest.approx(92.088, abs=0.001)
    assert released.ops / 1e9 == pytest.approx(9.368, abs=0.001)
    whole, _ = counted("bedrooms-w1a1-bidm")
    assert whole.size_mb - released.size_mb == pytest.approx((22 * 896 - 50) * 4 / 2**20, abs=1e-6)
    assert whole.ops - released.ops == 22 * 896


@pytest.mark.parametrize("scales", ["none", "paper", "all"])
@pytest.mark.parametrize(
    ("name", "bits", "structure"),
    [
        ("bedrooms-w1a4", Bits(1, 4, 8), "plain"),  # after the transition
        ("bedrooms-w1a4+method.ebb_center=true", Bits(1, 4, 8), "plain"),
        ("bedrooms-w1a32-baseline", Bits(1, 32, 8), "plain"),
        ("bedrooms-w2a4-lsq", Bits(2, 4, 8), "plain"),
        ("bedrooms-w4a4-qdiffusion", Bits(4, 4, 8), "plain"),
        ("bedrooms-w1a4-highorder", Bits(1, 4, 8), "high-order"),
        ("bedrooms-w1a4-lmb", Bits(1, 4, 8), "lmb"),
        ("bedrooms-w1a4-lmb+method.edge_bits=32", Bits(1, 4, 32), "lmb"),
        ("bedrooms-fp", Bits(), "plain"),
    ],
)
def test_what_a_method_builds_costs_what_its_structure_does(ldm_4, name, bits, structure, scales):
    found, student = counted(*name.split("+"), scales=scales)
    assert found == total(bill(ldm_4, bits, Structure(structure), scales=scales))
    assert main_bits(student) == bits


def test_only_what_inference_needs_counts():
    """TDQ: 100 steps per layer for its networks' 151 x 12,801 parameters. EfficientDM: 100 steps, 100 zero points."""
    plain, _ = counted("bedrooms-w1a4-baseline", scales="all")
    timed, student = counted("bedrooms-w1a4-tdq", scales="all")
    inner = sum(not layer.edge for layer in student.layers)
    assert (inner, timed.size_bits - plain.size_bits) == (151, 151 * 99 * 32)
    assert timed.ops == plain.ops
    adapted, _ = counted("bedrooms-w4a4-efficientdm", scales="all")
    affine, _ = counted("bedrooms-w4a4-qdiffusion", scales="all")
    assert adapted.size_bits - affine.size_bits == 151 * 199 * 32
    assert adapted.ops == affine.ops


def test_layers_left_real():
    _, student = counted("bedrooms-w4a4-efficientdm", "method.coverage=released")
    real = [layer for layer in student.layers if layer.built.weight == 32]
    assert len([layer for layer in real if layer.kind == "conv"]) == 18
    assert sum(layer.weights for layer in real if layer.kind == "conv") == pytest.approx(16.2e6, rel=5e-3)
    assert sum(layer.weights for layer in real if layer.kind == "projection") == pytest.approx(32.3e6, rel=5e-3)
    assert main_bits(student) == Bits(4, 4, 8)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_counted(method):
    """Its recipes of one miniature: of no more bits than 8, and never less than its weights' bits alone."""
    names = [name for name in recipe.names() if name.startswith("digits-w")]
    specs = [recipe.load(name) for name in names if costs.parse_recipe(name)[2] == method]
    for spec in specs:
        found, student = counted(spec.name)
        bits, full = main_bits(student), of_unet(spec.unet, build_unet)
        assert bits.weight <= 8, spec.name
        assert spec.name.startswith(f"digits-w{bits.weight}a{bits.activation}")
        assert found.size_bits > total(bill(full, bits)).size_bits - 32 * sum(layer.biases for layer in full.layers)
        assert {layer.name for layer in student.layers} == {layer.name for layer in full.layers}
    assert specs or method == "fp"


# ---- the papers' numbers: every size and every OPs of Tables 2, 5 and 16 ---------------------------------------------

PRINTED = [
    (cell.table, cell.row, cell.metric, cell.recipe, cell.value)
    for cell in tables.cells().itertuples()
    if cell.table in ("2", "5", "16") and cell.metric in ("size_mb", "ops_g")
]


def as_printed(name, metric):
    """Counted as the sizes of Table 2 are: edges in fp32, scales of all but the attentions' projections."""
    dataset, (weight, activation), method = costs.parse_recipe(name)
    found = of_unet(recipe.load(f"{dataset}-fp").unet, build_unet)
    structure = Structure(costs.OF_METHOD.get(method, "plain"))
    whole = total(bill(found, Bits(weight, activation, 32), structure, scales="paper"))
    return whole.size_mb if metric == "size_mb" else whole.ops / 1e9


def test_all_rows_are_compared():
    assert [sum(table == id for table, *_ in PRINTED) for id in ("2", "5", "16")] == [41, 10, 6]


@pytest.mark.parametrize(("table", "row", "metric", "name", "value"), PRINTED)
def test_beside_the_paper(table, row, metric, name, value):
    ours, (weight, _) = as_printed(name, metric), costs.parse_recipe(name)[1]
    if metric == "ops_g":
        assert f"{ours:.1f}" == value if weight == 32 else ours == pytest.approx(float(value), rel=0.05)
    elif "High-Order" in row:
        assert ours == pytest.approx(float(value), rel=0.003)
    elif weight > 1:
        assert f"{ours:.1f}" == value  # asked for: the digit at 32 bits, 0.3 % at 8, 4 and 2
    else:  # 35.8 and 38.1 fit no rule: between 8-bit and fp32 edges, and 2.6 and 4.2 % off the rule of all other rows
        assert (f"{ours:.1f}", value) in {("37.3", "35.8"), ("39.1", "38.1")}
        dataset = costs.parse_recipe(name)[0]
        low = total(bill(of_unet(recipe.load(f"{dataset}-fp").unet, build_unet), Bits(1, 4, 8), scales="paper"))
        assert low.size_mb < float(value) < ours


def test_sizes_without_scales_are_as_near_as_half_a_percent():
    for _, row, metric, name, value in PRINTED:
        dataset, (weight, activation), _ = costs.parse_recipe(name)
        if metric == "size_mb" and weight in (2, 4, 8):
            found = of_unet(recipe.load(f"{dataset}-fp").unet, build_unet)
            assert model_size_mb(found, Bits(weight, activation)) == pytest.approx(float(value), rel=0.004), row


@pytest.mark.parametrize(("bits", "value"), [((4, 4), 24.3), ((2, 4), 12.3), ((1, 4), 6.3)])
def test_the_papers_operations_lie_a_constant_above_eq_17(ldm_4, bits, value):
    """The note on Table 5: 0.25 G of floating-point work that the paper does not specify."""
    assert 0.2 <= value - operations(ldm_4, Bits(*bits)).ops / 1e9 <= 0.31


def test_the_notes_on_high_order_and_two_bases(ldm_4):
    one = total(bill(ldm_4, Bits(1, 4), scales="paper"))
    two = total(bill(ldm_4, Bits(1, 4), Structure("high-order"), scales="paper"))
    assert two.size_mb / one.size_mb == pytest.approx(1.88, abs=0.005)  # printed: 1.96
    full, lmb = total(bill(ldm_4, Bits())), total(bill(ldm_4, Bits(1, 4), Structure("lmb"), scales="paper"))
    assert full.size_mb / lmb.size_mb == pytest.approx(24.8, abs=0.05)
    assert full.ops / lmb.ops == pytest.approx(9.57, abs=0.005)
    assert full.ops / (lmb.ops + 0.25e9) == pytest.approx(9.3, abs=0.05)


def test_bidms_table(ldm_4):
    """Size and BOPs of its own accounting agree to the digit; its FLOPs are a tenth of what that leaves over."""
    paper = total(bill(ldm_4, Bits(1, 1), Structure("bidm-paper"), scales="paper"))
    assert round(paper.size_mb, 1) == 37.3
    assert round(paper.bops / 1e9, 1) == 92.1
    assert paper.flops / 1e9 == pytest.approx(10 * 0.38, rel=0.04)
    full = total(bill(ldm_4, Bits()))
    assert round(full.size_mb / paper.size_mb, 1) == 28.0
    assert round(paper.bops / 64e9 + 0.38, 2) == 1.82
    assert round(round(full.ops / 1e9, 1) / 1.82, 1) == 52.7
    skips = [layer for layer in ldm_4.layers if layer.skip]
    assert len(skips) == 15
    assert sum(layer.macs for layer in skips) == pytest.approx(3.879e9, rel=1e-3)


# ---- recipe ids ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("bedrooms-fp", ("bedrooms", (32, 32), "fp")),
        ("imagenet-fp+sample.sampler=plms", ("imagenet", (32, 32), "fp")),
        ("bedrooms-w1a32+method.lrm_k=2", ("bedrooms", (1, 32), "binarydm")),
        ("digits-ldm-w2a4-lsq", ("digits-ldm", (2, 4), "lsq")),
        ("bedrooms-w1a4-highorder", ("bedrooms", (1, 4), "highorder")),
    ],
)
def test_recipe_ids(name, parsed):
    assert costs.parse_recipe(name) == parsed


def test_what_is_no_recipe_id():
    with pytest.raises(ValueError, match="'bedrooms' is not a recipe id"):
        costs.parse_recipe("bedrooms")


def of_recipe(name):
    return costs.of_recipe(name, build_unet, outline)


def test_metrics_of_recipe_ids(ldm_4):
    assert set(of_recipe("bedrooms-fp")) == set(tables.COUNTED)
    found = of_recipe("bedrooms-w1a4")  # its file says 8-bit edges
    assert found["size_mb"] == total(bill(ldm_4, Bits(1, 4, 8), scales="paper")).size_mb
    assert found["ops_g"] == operations(ldm_4, Bits(1, 4, 8)).ops / 1e9
    assert found["size_saving"] == pytest.approx(30.39, abs=0.005)


def test_ids_without_a_file(ldm_4):
    found = of_recipe("ffhq-w3a3-efficientdm")  # FFHQ's network is that of Bedrooms
    assert found["size_mb"] == total(bill(ldm_4, Bits(3, 3, 8), scales="paper")).size_mb
    two = of_recipe("bedrooms-w1a2-highorder")
    assert two["bops_g"] * 1e9 == total(bill(ldm_4, Bits(1, 2, 8), Structure("high-order"))).bops
    assert of_recipe("bedrooms-w1a3-reactnet") == {}
    assert of_recipe("bedrooms-w1a4-unheardof") == {}
    assert of_recipe("elsewhere-w1a4") == {}


def test_a_recipes_fields_count(tmp_path, monkeypatch):
    text = 'extends = "bedrooms-w1a4"\nmethod = { edge_bits = 32 }\n'
    (tmp_path / "bedrooms-w1a4-mine.toml").write_text(text)
    roots = recipe.roots()
    monkeypatch.setattr(recipe, "roots", lambda: [tmp_path, *roots])
    assert round(of_recipe("bedrooms-w1a4-mine")["size_mb"], 1) == 37.3
    assert round(of_recipe("bedrooms-w1a4+method.edge_bits=32")["size_mb"], 1) == 37.3
