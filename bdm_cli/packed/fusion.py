"""Blocks of a U-Net around packed layers: what stands before, between and after these, done in fewer passes.

A normalisation becomes a gain and a shift per channel (ops.group_affine), which the next layer applies where it
quantizes its input, with the SiLU between them; biases of the time embedding and residuals are added where a layer
writes its output. Images are kept with their channels last. The numbers are those of the plain blocks up to fp32's
rounding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdm_cli.packed.layers import PackedConv2d, PackedLinear
from bdm_cli.quant.swap import replace_


def fuse_(unet: nn.Module) -> None:
    """Replace every residual block and attention whose layers are packed and have no frame, in place; let images be
    channels-last."""
    blocks = {module: PackedResnet(module) for module in unet.modules() if PackedResnet.fits(module)}
    replace_(unet, blocks)
    for module in unet.modules():
        if PackedAttnProcessor.fits(module):
            module.set_processor(PackedAttnProcessor())
    unet.conv_in.to(memory_format=torch.channels_last)
    unet.register_forward_pre_hook(_channels_last, with_kwargs=True)


def _channels_last(unet: nn.Module, arguments: tuple, options: dict) -> tuple[tuple, dict]:
    def turned(x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)

    if "sample" in options:
        return arguments, options | {"sample": turned(options["sample"])}
    return (turned(arguments[0]), *arguments[1:]), options


def _affine(norm: nn.GroupNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.bdm.group_affine(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


class PackedResnet(nn.Module):
    """diffusers' ResnetBlock2D with packed convolutions.

    h = conv1(SiLU(norm1(x))) + t;  y = (conv2(SiLU(norm2(h))) + shortcut(x)) / factor, t = proj(SiLU(temb)); with
    "scale_shift", norm2(h) (1 + scale) + shift instead, (scale, shift) = t. Up- and downsampling stand before conv1.

    Shapes: x [N, C, H, W], temb [N, E]; y [N, C', H', W'].
    """

    PARTS = ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut", "upsample", "downsample")

    @staticmethod
    def fits(module: nn.Module) -> bool:
        convs = (getattr(module, "conv1", None), getattr(module, "conv2", None))
        return (
            all(isinstance(conv, PackedConv2d) and conv.frame is None for conv in convs)
            and not module._forward_hooks
            and isinstance(getattr(module, "nonlinearity", None), nn.SiLU)
            and isinstance(module.norm1, nn.GroupNorm)
            and isinstance(module.norm2, nn.GroupNorm)
            and getattr(module, "time_embedding_norm", "") in ("default", "scale_shift")
        )

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        for name in self.PARTS:
            setattr(self, name, getattr(block, name))
        self.scale_shift = block.time_embedding_norm == "scale_shift"
        self.active = bool(block.skip_time_act)
        self.factor = float(block.output_scale_factor)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        before = _affine(self.norm1, x)
        resample = self.upsample or self.downsample
        if resample is not None:
            gain, shift = (part[..., None, None] for part in before)
            h, before, x = resample(F.silu(x * gain + shift)), None, resample(x)
        else:
            h = x
        t = None
        if self.time_emb_proj is not None and temb is not None:
            t = self.time_emb_proj(temb if self.active else F.silu(temb))
        h = self.conv1(h, before, silu=before is not None, more=None if self.scale_shift else t)
        gain, shift = _affine(self.norm2, h)
        if self.scale_shift and t is not None:
            by, plus = t.chunk(2, dim=1)
            gain, shift = gain * (1 + by), shift * (1 + by) + plus
        residual = x if self.conv_shortcut is None else self.conv_shortcut(x)
        y = self.conv2(h, (gain, shift), silu=True, residual=residual)
        return y if self.factor == 1 else y / self.factor


class PackedAttnProcessor:
    """Attention between packed projections, in place of diffusers' processor: no mask, no norm of queries and keys.

    Shapes: hidden_states [N, C, H, W] or [N, L, C]; returns the same.
    """

    @staticmethod
    def fits(module: nn.Module) -> bool:
        if not (hasattr(module, "set_processor") and hasattr(module, "to_q")):
            return False
        layers = (module.to_q, module.to_k, module.to_v, module.to_out[0])
        plain = all(getattr(module, name, None) is None for name in ("spatial_norm", "norm_q", "norm_k", "norm_cross"))
        return (
            all(isinstance(layer, PackedLinear) and layer.frame is None for layer in layers)
            and plain
            and not isinstance(module.processor, nn.Module)  # quantized operands stay as they are
        )

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        if attention_mask is not None:
            raise ValueError("PackedAttnProcessor takes no mask")
        shape, before = hidden_states.shape, None
        x = hidden_states.flatten(2).transpose(1, 2) if len(shape) == 4 else hidden_states
        if attn.group_norm is not None:
            before = _affine(attn.group_norm, hidden_states if len(shape) == 4 else x.transpose(1, 2).contiguous())
        q = attn.to_q(x, before)
        if encoder_hidden_states is None:
            k, v = attn.to_k(x, before), attn.to_v(x, before)
        else:
            k, v = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        y = torch.ops.bdm.attention(q, k, v, attn.heads, attn.scale)
        y = attn.to_out[0](y, residual=x if attn.residual_connection else None)
        y = y if attn.rescale_output_factor == 1 else y / attn.rescale_output_factor
        return y.unflatten(1, shape[2:]).permute(0, 3, 1, 2) if len(shape) == 4 else y
