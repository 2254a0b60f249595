"""The original networks as functions of their published state dicts: what a converted network is compared with.

Written from the architectures, with the original tensor names and without diffusers or bdm_cli: ermongroup/ddim
models/diffusion.py (CIFAR-10), CompVis/latent-diffusion ldm/modules/diffusionmodules/openaimodel.py and
ldm/modules/attention.py (the latent U-Nets), ldm/modules/diffusionmodules/model.py and ldm/models/autoencoder.py (the
first stages). The structure of a network is read off its names. They compute in the state's dtype, without dropout.

manifests/*.json: tensor names and shapes of the published files. Weights made up for them: shrunk, random_state.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]

MANIFESTS = Path(__file__).parent / "manifests"
GROUPS = 32
LEFTOVERS = ("ddim_sigmas", "ddim_alphas", "ddim_alphas_prev", "ddim_sqrt_one_minus_alphas")
"""Buffers of an older sampler that the published bedrooms file still carries."""


# Names and made-up weights


def manifest(name: str) -> Shapes:
    """Shape of every tensor of a published file; names: ddim-cifar10, ldm-lsun-bedrooms256, ..., vq-f4, kl-f8."""
    return {k: tuple(shape) for k, shape in json.loads((MANIFESTS / f"{name}.json").read_text()).items()}


def below(entries: dict, prefix: str) -> dict:
    """The entries whose names start with the prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in entries.items() if k.startswith(prefix)}


def squeezed(name: str) -> str:
    """Where ldm/modules/ema.py keeps the average of `model.<...>`: without `model.` and without dots."""
    return "model_ema." + name.removeprefix("model.").replace(".", "")


def averaged(state: State) -> State:
    """The state of a LatentDiffusion inside its ema_scope: averages in place of the weights below `model.`."""
    return {k: state[squeezed(k)] if k.startswith("model.") else v for k, v in state.items()}


def shrunk(shapes: Shapes, width: int, first_stage_width: int | None = None) -> Shapes:
    """The manifest of the same networks with `width` channels where they have their fewest (224 -> 32: all widths / 7).

    first_stage_width: the same for the first stage inside a latent model; None leaves it as it is.
    Codebook, class embedding, context, schedule, scale factor and losses keep their shapes.
    """
    small = {}
    for name, shape in shapes.items():
        base, new = _base_width(shapes, name), first_stage_width if name.startswith("first_stage_model.") else width
        divide = base and new and not name.endswith("embedding.weight")
        small[name] = tuple(n // base * new if divide and n % base == 0 else n for n in shape)
    return small


def _base_width(shapes: Shapes, name: str) -> int:
    """Output channels of the first convolution of the network that the tensor belongs to; 0 for none."""
    first = {
        "model": "model.diffusion_model.input_blocks.0.0.weight",
        "model_ema": "model.diffusion_model.input_blocks.0.0.weight",
        "first_stage_model": "first_stage_model.encoder.conv_in.weight",
        **dict.fromkeys(("temb", "conv_in", "down", "mid", "up", "norm_out", "conv_out"), "conv_in.weight"),
        **dict.fromkeys(("encoder", "decoder", "quant_conv", "post_quant_conv"), "encoder.conv_in.weight"),
    }.get(name.split(".")[0])
    return shapes[first][0] if first else 0


def random_state(shapes: Shapes, seed: int = 0, linear_end: float = 0.0195) -> State:
    """Weights for which outputs are of order 1, averages independent of the raw weights, and a true schedule.

    linear_end: of the sqrt-spaced schedule that begins at 0.0015.
    """
    generator = torch.Generator().manual_seed(seed)
    known = schedule(linear_end=linear_end) | {
        "scale_factor": torch.tensor(0.22),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(123_456, dtype=torch.int32),
    }
    return {k: known[k] if k in known else _random(k, shape, generator) for k, shape in shapes.items()}


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if name.endswith("embedding.weight"):
        return noise
    if len(shape) > 1:
        return noise.mul_(math.prod(shape[1:]) ** -0.5)
    return noise.mul_(0.1).add_(1.0 if name.endswith("weight") else 0.0)


def schedule(n: int = 1000, linear_start: float = 0.0015, linear_end: float = 0.0195) -> State:
    """The 12 buffers of ldm/models/diffusion/ddpm.py's DDPM, [n] each, for its "linear" (sqrt-spaced) betas."""
    betas = torch.linspace(linear_start**0.5, linear_end**0.5, n, dtype=torch.float64) ** 2
    kept = torch.cumprod(1 - betas, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
    variance = betas * (1 - before) / (1 - kept)
    buffers = {
        "betas": betas,
        "alphas_cumprod": kept,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": kept.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - kept).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - kept).log(),
        "sqrt_recip_alphas_cumprod": (1 / kept).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / kept - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * before.sqrt() / (1 - kept),
        "posterior_mean_coef2": (1 - before) * (1 - betas).sqrt() / (1 - kept),
    }
    return {k: v.float() for k, v in buffers.items()}


# Layers, by the name of their tensors


def _conv(s: State, name: str, x: Tensor, stride: int = 1, padding: int | None = None) -> Tensor:
    weight = s[f"{name}.weight"]
    return F.conv2d(x, weight, s[f"{name}.bias"], stride, weight.shape[-1] // 2 if padding is None else padding)


def _linear(s: State, name: str, x: Tensor) -> Tensor:
    """Over the last axis; a pointwise convolution's weight [D, C, 1(, 1)] counts as a matrix."""
    return F.linear(x, s[f"{name}.weight"].flatten(1), s.get(f"{name}.bias"))


def _group_norm(s: State, name: str, x: Tensor, eps: float) -> Tensor:
    return F.group_norm(x, GROUPS, s[f"{name}.weight"], s[f"{name}.bias"], eps)


def _layer_norm(s: State, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], s[f"{name}.weight"], s[f"{name}.bias"], 1e-5)


def _double(x: Tensor) -> Tensor:
    """Nearest-neighbour upsampling to twice the size."""
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def _tokens(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, H W, C]."""
    return x.flatten(2).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q k' / sqrt(d)) v per head; q [N, T, C], k and v [N, S, C], head h having columns h d .. (h + 1) d."""
    q, k, v = (x.unflatten(2, (heads, -1)) for x in (q, k, v))
    weights = torch.einsum("nthd,nshd->nhts", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("nhts,nshd->nthd", weights.softmax(-1), v).flatten(2)


def _numbered(s: State, prefix: str) -> int:
    """How many consecutive numbers stand after the prefix."""
    return 1 + max((int(k.removeprefix(prefix).split(".")[0]) for k in s if k.startswith(prefix)), default=-1)


# ermongroup/ddim, and the first stages, which are made of the same blocks


def ddim_embedding(t: Tensor, width: int) -> Tensor:
    """[N] -> [N, width]: sines, then cosines of t 10000^(-i / (width/2 - 1))."""
    half = width // 2
    angle = t.float()[:, None] * torch.exp(torch.arange(half) * -(math.log(10_000) / (half - 1)))
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def ddim_cifar(state: State, x: Tensor, t: Tensor) -> Tensor:
    """eps(x, t) of ermongroup's Model: x [N, 3, H, W], t [N]."""
    embedding = ddim_embedding(t, state["temb.dense.0.weight"].shape[1]).to(x.dtype)
    embedding = _linear(state, "temb.dense.1", F.silu(_linear(state, "temb.dense.0", embedding)))
    skips = _contract(state, "", x, embedding)
    h = _middle(state, "", skips[-1], embedding)
    return _expand(state, "", h, embedding, skips)


def _block(s: State, name: str, x: Tensor, embedding: Tensor | None) -> Tensor:
    """ResnetBlock: the time embedding is added between the convolutions."""
    h = _conv(s, f"{name}.conv1", F.silu(_group_norm(s, f"{name}.norm1", x, 1e-6)))
    if embedding is not None:
        h = h + _linear(s, f"{name}.temb_proj", F.silu(embedding))[:, :, None, None]
    h = _conv(s, f"{name}.conv2", F.silu(_group_norm(s, f"{name}.norm2", h, 1e-6)))
    return h + (_conv(s, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in s else x)


def _attention(s: State, name: str, x: Tensor) -> Tensor:
    """AttnBlock: one head over all channels."""
    h = _tokens(_group_norm(s, f"{name}.norm", x, 1e-6))
    h = _attend(*(_linear(s, f"{name}.{part}", h) for part in "qkv"), heads=1)
    return x + _linear(s, f"{name}.proj_out", h).transpose(1, 2).reshape(x.shape)


def _level(s: State, name: str, x: Tensor, embedding: Tensor | None, j: int) -> Tensor:
    """The j-th block of a resolution level and the attention behind it, if the level has one."""
    x = _block(s, f"{name}.block.{j}", x, embedding)
    return _attention(s, f"{name}.attn.{j}", x) if f"{name}.attn.{j}.q.weight" in s else x


def halve(s: State, name: str, x: Tensor) -> Tensor:
    """Stride-2 convolution after one row and one column of zeros at the bottom and right only."""
    return _conv(s, name, F.pad(x, (0, 1, 0, 1)), stride=2, padding=0)


def _contract(s: State, prefix: str, x: Tensor, embedding: Tensor | None) -> list[Tensor]:
    """Every intermediate result of the contracting half."""
    results = [_conv(s, f"{prefix}conv_in", x)]
    for i in range(_numbered(s, f"{prefix}down.")):
        for j in range(_numbered(s, f"{prefix}down.{i}.block.")):
            results.append(_level(s, f"{prefix}down.{i}", results[-1], embedding, j))
        if f"{prefix}down.{i}.downsample.conv.weight" in s:
            results.append(halve(s, f"{prefix}down.{i}.downsample.conv", results[-1]))
    return results


def _middle(s: State, prefix: str, h: Tensor, embedding: Tensor | None) -> Tensor:
    h = _attention(s, f"{prefix}mid.attn_1", _block(s, f"{prefix}mid.block_1", h, embedding))
    return _block(s, f"{prefix}mid.block_2", h, embedding)


def _expand(s: State, prefix: str, h: Tensor, embedding: Tensor | None, skips: list[Tensor] | None) -> Tensor:
    """The expanding half, from the highest level to level 0; each block also reads the last of the skips, if given."""
    for i in reversed(range(_numbered(s, f"{prefix}up."))):
        for j in range(_numbered(s, f"{prefix}up.{i}.block.")):
            if skips is not None:
                h = torch.cat([h, skips.pop()], dim=1)
            h = _level(s, f"{prefix}up.{i}", h, embedding, j)
        if f"{prefix}up.{i}.upsample.conv.weight" in s:
            h = _conv(s, f"{prefix}up.{i}.upsample.conv", _double(h))
    return _out(s, prefix, h)


def _out(s: State, prefix: str, h: Tensor) -> Tensor:
    return _conv(s, f"{prefix}conv_out", F.silu(_group_norm(s, f"{prefix}norm_out", h, 1e-6)))


def _encode(state: State, x: Tensor) -> Tensor:
    h = _middle(state, "encoder.", _contract(state, "encoder.", x, None)[-1], None)
    return _conv(state, "quant_conv", _out(state, "encoder.", h))


def _decode(state: State, z: Tensor) -> Tensor:
    h = _conv(state, "decoder.conv_in", _conv(state, "post_quant_conv", z))
    return _expand(state, "decoder.", _middle(state, "decoder.", h, None), None, None)


def vq_encode(state: State, x: Tensor) -> Tensor:
    """Latents of VQModelInterface, before quantization: x [N, 3, H, W] in [-1, 1]."""
    return _encode(state, x)


def nearest_codes(codebook: Tensor, z: Tensor) -> Tensor:
    """Index [N, H, W] of the entry of the codebook [K, C] with the least |z|^2 + |e|^2 - 2 z e for each pixel of z."""
    pixels = z.permute(0, 2, 3, 1)
    return (pixels.square().sum(-1, keepdim=True) + codebook.square().sum(1) - 2 * pixels @ codebook.T).argmin(-1)


def vq_decode(state: State, z: Tensor, quantize: bool = True) -> Tensor:
    """Image of VQModelInterface from latents z [N, 3, h, w], each pixel of which is first put on its nearest code."""
    if quantize:
        codebook = state["quantize.embedding.weight"]
        z = codebook[nearest_codes(codebook, z)].permute(0, 3, 1, 2)
    return _decode(state, z)


def kl_moments(state: State, x: Tensor) -> Tensor:
    """Means and log variances, [N, 2 * 4, h, w], of AutoencoderKL's posterior: x [N, 3, H, W] in [-1, 1]."""
    return _encode(state, x)


def kl_decode(state: State, z: Tensor) -> Tensor:
    """Image of AutoencoderKL from unscaled latents z [N, 4, h, w]."""
    return _decode(state, z)


# CompVis/latent-diffusion UNetModel


def ldm_embedding(t: Tensor, width: int) -> Tensor:
    """[N] -> [N, width]: cosines, then sines of t 10000^(-i / (width/2))."""
    half = width // 2
    angle = t.float()[:, None] * torch.exp(-math.log(10_000) * torch.arange(half) / half)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def ldm_unet(
    state: State,
    x: Tensor,
    t: Tensor,
    context: Tensor | None = None,
    *,
    heads: int | None = None,
    head_width: int | None = None,
    blocks_per_level: int = 2,
) -> Tensor:
    """eps(x, t) of UNetModel: x [N, C, H, W], t [N], context [N, L, D] for the networks with cross-attention.

    What the names do not tell: either the number or the width of the attention heads, and after how many residual
    blocks a level is left (where the way to the next level is a residual block too).
    """
    if (heads is None) == (head_width is None):
        raise ValueError("give either heads or head_width")
    embedding = ldm_embedding(t, state["time_embed.0.weight"].shape[1]).to(x.dtype)
    embedding = _linear(state, "time_embed.2", F.silu(_linear(state, "time_embed.0", embedding)))

    def run(block: str, h: Tensor, last_res_block: str = "plain") -> Tensor:
        """One TimestepEmbedSequential; its last child, if a residual block, may change the size ("half", "double")."""
        children = range(_numbered(state, f"{block}."))
        for child in children:
            name = f"{block}.{child}"
            if f"{name}.in_layers.0.weight" in state:
                h = res_block(state, name, h, embedding, last_res_block if child == children[-1] else "plain")
            elif f"{name}.qkv.weight" in state:
                h = attention_block(state, name, h, heads or h.shape[1] // head_width)
            elif f"{name}.proj_in.weight" in state:
                h = spatial_transformer(state, name, h, context, heads or h.shape[1] // head_width)
            elif f"{name}.op.weight" in state:
                h = _conv(state, f"{name}.op", h, stride=2)
            elif f"{name}.conv.weight" in state:
                h = _conv(state, f"{name}.conv", _double(h))
            else:
                h = _conv(state, name, h)
        return h

    skips, h = [], x
    for n in range(_numbered(state, "input_blocks.")):
        h = run(f"input_blocks.{n}", h, "half" if n and n % (blocks_per_level + 1) == 0 else "plain")
        skips.append(h)
    h = run("middle_block", h)
    for n in range(_numbered(state, "output_blocks.")):
        several = _numbered(state, f"output_blocks.{n}.") > 1
        h = run(f"output_blocks.{n}", torch.cat([h, skips.pop()], dim=1), "double" if several else "plain")
    return _conv(state, "out.2", F.silu(_group_norm(state, "out.0", h, 1e-5)))


def res_block(s: State, name: str, x: Tensor, embedding: Tensor, size: str = "plain") -> Tensor:
    """ResBlock: the embedding is added between the convolutions, or scales and shifts the second norm's result.

    size: "half" averages 2 x 2 pixels, "double" repeats them, in the branch (between norm and convolution) and beside.
    """
    resize = {"plain": lambda h: h, "half": lambda h: F.avg_pool2d(h, 2), "double": _double}[size]
    h = _conv(s, f"{name}.in_layers.2", resize(F.silu(_group_norm(s, f"{name}.in_layers.0", x, 1e-5))))
    e = _linear(s, f"{name}.emb_layers.1", F.silu(embedding))[:, :, None, None]
    if e.shape[1] == 2 * h.shape[1]:
        scale, shift = e.tensor_split(2, dim=1)
        h = _group_norm(s, f"{name}.out_layers.0", h, 1e-5) * (1 + scale) + shift
    else:
        h = _group_norm(s, f"{name}.out_layers.0", h + e, 1e-5)
    h = _conv(s, f"{name}.out_layers.3", F.silu(h))
    x = resize(x)
    return h + (_conv(s, f"{name}.skip_connection", x) if f"{name}.skip_connection.weight" in s else x)


def attention_block(s: State, name: str, x: Tensor, heads: int) -> Tensor:
    """AttentionBlock with QKVAttentionLegacy: the rows of qkv are q, k, v of head 0, then q, k, v of head 1, ..."""
    qkv = _linear(s, f"{name}.qkv", _tokens(_group_norm(s, f"{name}.norm", x, 1e-5)))
    q, k, v = (part.flatten(2) for part in qkv.unflatten(2, (heads, 3, -1)).unbind(3))
    h = _linear(s, f"{name}.proj_out", _attend(q, k, v, heads))
    return x + h.transpose(1, 2).reshape(x.shape)


def spatial_transformer(s: State, name: str, x: Tensor, context: Tensor, heads: int) -> Tensor:
    """SpatialTransformer: in each block self-attention, attention to the context [N, L, D], gated feed-forward."""
    h = _tokens(_conv(s, f"{name}.proj_in", _group_norm(s, f"{name}.norm", x, 1e-6)))
    for i in range(_numbered(s, f"{name}.transformer_blocks.")):
        block = f"{name}.transformer_blocks.{i}"
        normed = _layer_norm(s, f"{block}.norm1", h)
        h = h + _cross_attention(s, f"{block}.attn1", normed, normed, heads)
        h = h + _cross_attention(s, f"{block}.attn2", _layer_norm(s, f"{block}.norm2", h), context, heads)
        h = h + feed_forward(s, f"{block}.ff", _layer_norm(s, f"{block}.norm3", h))
    return x + _conv(s, f"{name}.proj_out", h.transpose(1, 2).reshape(x.shape))


def _cross_attention(s: State, name: str, x: Tensor, context: Tensor, heads: int) -> Tensor:
    q, k, v = (_linear(s, f"{name}.to_{part}", y) for part, y in zip("qkv", (x, context, context), strict=True))
    return _linear(s, f"{name}.to_out.0", _attend(q, k, v, heads))


def feed_forward(s: State, name: str, x: Tensor) -> Tensor:
    """GEGLU: the first half of the projection times the exact GELU of the second; x [N, T, C]."""
    value, gate = _linear(s, f"{name}.net.0.proj", x).tensor_split(2, dim=-1)
    return _linear(s, f"{name}.net.2", value * F.gelu(gate))
