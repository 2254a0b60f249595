"""Sizes and operations: by hand on small networks, and the papers' numbers on the real ones (methods.md, 1.5-1.6)."""

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

from bdm_cli.jobs.efficiency import meta_inputs
from bdm_cli.metrics.cost import Bits, model_size_mb, network_cost, operations, scales_mb

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
        unet = kind(**arguments)
        return network_cost(unet, meta_inputs(unet))


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
