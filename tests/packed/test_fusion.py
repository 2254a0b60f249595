"""Fused blocks against the plain ones, in U-Nets of every kind; and that blocks which do not fit stay as they are."""

import copy
import statistics
from collections.abc import Callable, Iterator

import pytest
import students
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from bdm_cli import student
from bdm_cli.methods.base import Method
from bdm_cli.packed import ops
from bdm_cli.packed.fusion import PackedAttnProcessor, PackedResnet, fuse_
from bdm_cli.packed.layers import unpack_
from bdm_cli.recipe import Recipe

TinyRecipe = Callable[..., Recipe]

SMALL = {"sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
DOWN, UP = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
UNETS = {
    "plain": lambda: UNet2DModel(**SMALL, down_block_types=DOWN, up_block_types=UP, attention_head_dim=16),
    "as LDM-8": lambda: UNet2DModel(
        **SMALL,
        down_block_types=DOWN,
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        downsample_type="resnet",
        upsample_type="resnet",
        attention_head_dim=16,
        attn_norm_num_groups=8,
        resnet_time_scale_shift="scale_shift",
    ),
    "with a context": lambda: UNet2DConditionModel(
        **SMALL,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        cross_attention_dim=24,
        attention_head_dim=4,
    ),
}


def packed_and_fused(make: Callable[[], nn.Module], spec: Recipe, bits: int) -> tuple[nn.Module, nn.Module, tuple]:
    """The same random student as packed layers in plain blocks and in fused ones, and inputs for both."""
    torch.manual_seed(0)
    unet = make().eval()
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    inputs = (torch.randn(2, 3, 16, 16), torch.tensor([3, 700]))
    if isinstance(unet, UNet2DConditionModel):
        inputs += (torch.randn(2, 5, 24),)
    method = Method(activation_bits=bits)
    method.quantize_(unet)
    method.calibrate_(unet, unet, [inputs])
    found = students.packed(spec, unet.eval().requires_grad_(False))
    nets = []
    for _ in range(2):
        with torch.device("meta"):
            target = make()
        unpack_(target, found)
        nets.append(target.eval().requires_grad_(False))
    fuse_(nets[1])
    return *nets, inputs


@torch.inference_mode()
def noise(unet: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    return unet(*inputs, return_dict=False)[0]


@pytest.fixture(params=[name for name in ops.PATHS if name == "torch" or name in ops.library().paths])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("BDM_KERNEL", request.param)
    ops.path.cache_clear()
    yield request.param
    ops.path.cache_clear()


@pytest.mark.parametrize("name", UNETS)
def test_with_real_activations_only_rounding_differs(name: str, path: str, tiny_recipe: TinyRecipe):
    """No level can flip, so that every wrong constant, order or axis shows."""
    plain, fused, inputs = packed_and_fused(UNETS[name], tiny_recipe(), 32)
    expected = noise(plain, inputs)
    assert (noise(fused, inputs) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", UNETS)
def test_with_few_bits_most_blocks_agree_to_the_last_bits(name: str, path: str, tiny_recipe: TinyRecipe):
    """Each block by itself: a flipped level is rare, although it moves a good part of a small image."""
    plain, fused, inputs = packed_and_fused(UNETS[name], tiny_recipe(), 4)
    blocks = [n for n, m in fused.named_modules() if isinstance(m, PackedResnet)]
    agreeing = []
    for block in blocks:
        found: dict[str, tuple] = {}
        hook = plain.get_submodule(block).register_forward_hook(
            lambda module, arguments, y, block=block, found=found: found.update({block: (arguments, y)})
        )
        noise(plain, inputs)
        hook.remove()
        arguments, expected = found[block]
        with torch.inference_mode():
            y = fused.get_submodule(block)(*arguments)
        agreeing.append(((y - expected).abs() < 1e-5 * expected.abs().max()).float().mean().item())
    assert len(blocks) >= 5
    assert statistics.median(agreeing) > 0.99


@pytest.mark.parametrize("name", UNETS)
def test_every_block_is_fused(name: str, tiny_recipe: TinyRecipe):
    plain, fused, _ = packed_and_fused(UNETS[name], tiny_recipe(), 4)
    old = [m for m in plain.modules() if type(m).__name__ == "ResnetBlock2D"]
    assert len([m for m in fused.modules() if isinstance(m, PackedResnet)]) == len(old) > 0
    attentions = [m for m in fused.modules() if hasattr(m, "to_q")]
    assert attentions
    assert all(isinstance(m.processor, PackedAttnProcessor) for m in attentions)
    assert {n for n, _ in plain.named_parameters()} == {n for n, _ in fused.named_parameters()}


def test_images_stay_channels_last(tiny_recipe: TinyRecipe):
    _, fused, inputs = packed_and_fused(UNETS["plain"], tiny_recipe(), 4)
    seen = []
    for module in fused.modules():
        if isinstance(module, PackedResnet):
            module.register_forward_hook(
                lambda m, a, y: seen.append(y.is_contiguous(memory_format=torch.channels_last)) and None
            )
    noise(fused, tuple(part[:1] for part in inputs))
    assert seen
    assert all(seen)


def test_a_copy_computes_by_itself(tiny_recipe: TinyRecipe):
    _, fused, inputs = packed_and_fused(UNETS["as LDM-8"], tiny_recipe(), 32)
    expected, other = noise(fused, inputs), copy.deepcopy(fused)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.zero_()
    assert torch.equal(noise(other, inputs), expected)


def test_blocks_that_do_not_fit_stay(tiny_recipe: TinyRecipe):
    """Quantized attention operands keep their processor; a block whose layers are not packed keeps its own form."""
    spec = tiny_recipe("method.attention_matmul=true")
    found = students.packed(spec, students.finished(spec))
    unet = student.unpacked(found, None)
    before = [m.processor for m in unet.modules() if hasattr(m, "to_q")]
    fuse_(unet)
    assert [m.processor for m in unet.modules() if hasattr(m, "to_q")] == before
    real = UNETS["plain"]()
    fuse_(real)
    assert not [m for m in real.modules() if isinstance(m, PackedResnet)]


def test_a_mask_is_refused(tiny_recipe: TinyRecipe):
    _, fused, inputs = packed_and_fused(UNETS["with a context"], tiny_recipe(), 4)
    with pytest.raises(ValueError, match="no mask"):
        fused(*inputs, encoder_attention_mask=torch.ones(2, 5))
