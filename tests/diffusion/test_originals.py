"""The oracle for converted networks (originals.py), against NumPy and the published counts."""

import math

import numpy as np
import originals
import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor

UNETS = {
    "ldm-lsun-bedrooms256": {"head_width": 32},
    "ldm-ffhq256": {"head_width": 32},
    "ldm-lsun-churches256": {"heads": 8},
    "ldm-cin256-v2": {"heads": 1},
}
COUNTS = {
    "ddim-cifar10": (328, 35_746_307),
    "ldm-lsun-bedrooms256": (955, 603_447_110),
    "ldm-ffhq256": (955, 603_447_110),
    "ldm-lsun-churches256": (1303, 673_599_698),
    "ldm-cin256-v2": (906, 456_767_873),
    "vq-f4": (260, 72_806_376),
    "kl-f8": (304, 101_137_458),
}
"""Tensors and elements of the published files."""


class Watched(dict):
    """A state that remembers which of its tensors were taken."""

    def __init__(self, entries: dict):
        super().__init__(entries)
        self.taken = set()

    def __getitem__(self, key: str) -> Tensor:
        self.taken.add(key)
        return super().__getitem__(key)

    def get(self, key: str) -> Tensor | None:
        self.taken.add(key)
        return super().get(key)


def small(name: str, prefix: str = "") -> Watched:
    state = originals.random_state(originals.shrunk(originals.manifest(name), 32, first_stage_width=32), seed=1)
    return Watched({k: v for k, v in originals.below(state, prefix).items() if not k.startswith("loss.")})


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check(state: Watched, y: Tensor, shape: tuple[int, ...]) -> None:
    assert y.shape == shape
    assert 0.2 < y.std() < 2
    assert state.keys() <= state.taken, "every tensor of the file has its part in the result"


# The networks


def test_ddim_reads_every_tensor():
    state = small("ddim-cifar10")
    check(state, originals.ddim_cifar(state, noise(2, 3, 16, 16), torch.tensor([0, 999])), (2, 3, 16, 16))


@pytest.mark.parametrize("name", UNETS)
def test_ldm_unet_reads_every_tensor(name: str):
    state = small(name, "model.diffusion_model.")
    channels = state["out.2.weight"].shape[0]
    context = noise(2, 1, 512, seed=1) if name == "ldm-cin256-v2" else None
    y = originals.ldm_unet(state, noise(2, channels, 16, 16), torch.tensor([0, 999]), context, **UNETS[name])
    check(state, y, (2, channels, 16, 16))


def test_ldm_unet_wants_to_know_the_heads():
    with pytest.raises(ValueError, match="either heads or head_width"):
        originals.ldm_unet(small("ldm-ffhq256", "model.diffusion_model."), noise(1, 3, 16, 16), torch.tensor([0]))


@pytest.mark.parametrize("name", ["vq-f4", "ldm-lsun-bedrooms256", "ldm-cin256-v2"])
def test_vq_reads_every_tensor(name: str):
    state = small(name, "" if name == "vq-f4" else "first_stage_model.")
    z = originals.vq_encode(state, noise(2, 3, 32, 32))
    assert z.shape == (2, 3, 8, 8)
    check(state, originals.vq_decode(state, z), (2, 3, 32, 32))


@pytest.mark.parametrize("name", ["kl-f8", "ldm-lsun-churches256"])
def test_kl_reads_every_tensor(name: str):
    state = small(name, "" if name == "kl-f8" else "first_stage_model.")
    moments = originals.kl_moments(state, noise(2, 3, 32, 32))
    assert moments.shape == (2, 8, 4, 4)
    check(state, originals.kl_decode(state, moments[:, :4]), (2, 3, 32, 32))


# Layers in NumPy


def test_ddim_embedding():
    t, i = np.array([0, 7, 933.5]), np.arange(16)
    angle = t[:, None] / 10_000 ** (i / 15)
    expected = np.concatenate([np.sin(angle), np.cos(angle)], 1)
    assert_allclose(originals.ddim_embedding(torch.tensor(t), 32), expected, atol=1e-4)


def test_ldm_embedding():
    t, i = np.array([0, 7, 933.5]), np.arange(16)
    angle = t[:, None] / 10_000 ** (i / 16)
    expected = np.concatenate([np.cos(angle), np.sin(angle)], 1)
    assert_allclose(originals.ldm_embedding(torch.tensor(t), 32), expected, atol=1e-4)


def layer(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
    """float64 weights of a layer called `x`, for torch and for NumPy."""
    state = originals.random_state({f"x.{k}": v for k, v in shapes.items()}, seed)
    state = {k: v.double() for k, v in state.items()}
    return state, {k.removeprefix("x."): v.numpy() for k, v in state.items()}


def group_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    """x [N, C, ...] in 32 groups of consecutive channels."""
    groups = x.reshape(x.shape[0], 32, -1)
    normed = (groups - groups.mean(-1, keepdims=True)) / np.sqrt(groups.var(-1, keepdims=True) + eps)
    after = (slice(None), *[None] * (x.ndim - 2))
    return normed.reshape(x.shape) * weight[after] + bias[after]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def pointwise(weight: np.ndarray, bias: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.einsum("dc,nct->ndt", weight.reshape(weight.shape[:2]), x) + bias[:, None]


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_attention_block_has_the_legacy_order(heads: int):
    """Head h has the rows 3 h d .. 3 (h + 1) d of qkv: first its q, then its k, then its v."""
    c, d = 64, 64 // heads
    norm = {"norm.weight": (c,), "norm.bias": (c,)}
    rest = {"qkv.weight": (3 * c, c, 1), "qkv.bias": (3 * c,), "proj_out.weight": (c, c, 1), "proj_out.bias": (c,)}
    state, w = layer(norm | rest)
    x = noise(2, c, 3, 3).double()
    flat = x.numpy().reshape(2, c, 9)
    qkv = pointwise(w["qkv.weight"], w["qkv.bias"], group_norm(flat, w["norm.weight"], w["norm.bias"], 1e-5))
    out = np.empty_like(flat)
    for n in range(2):
        for h in range(heads):
            q, k, v = (qkv[n, (3 * h + part) * d : (3 * h + part + 1) * d] for part in range(3))  # [d, T] each
            out[n, h * d : (h + 1) * d] = v @ softmax(q.T @ k / math.sqrt(d)).T
    expected = flat + pointwise(w["proj_out.weight"], w["proj_out.bias"], out)
    result = originals.attention_block(state, "x", x, heads)
    assert_allclose(result.reshape(2, c, 9), expected, atol=1e-12)


def block_shapes(c: int, rows: int) -> dict[str, tuple[int, ...]]:
    """A ResBlock on single pixels: of its 3 x 3 convolutions only the middle then matters."""
    convs = {"in_layers.2.weight": (c, c, 3, 3), "out_layers.3.weight": (c, c, 3, 3)}
    norms = {f"{side}_layers.0.{kind}": (c,) for side in ("in", "out") for kind in ("weight", "bias")}
    biases = {"in_layers.2.bias": (c,), "out_layers.3.bias": (c,), "emb_layers.1.bias": (rows,)}
    return convs | norms | biases | {"emb_layers.1.weight": (rows, 16)}


@pytest.mark.parametrize("scale_shift", [False, True])
def test_res_block(scale_shift: bool):
    c = 64
    state, w = layer(block_shapes(c, 2 * c if scale_shift else c))
    x, e = noise(2, c, 1, 1).double(), noise(2, 16, seed=1).double()
    flat = x.numpy()[..., 0]
    h = silu(group_norm(flat, w["in_layers.0.weight"], w["in_layers.0.bias"], 1e-5))
    h = pointwise(w["in_layers.2.weight"][..., 1, 1], w["in_layers.2.bias"], h)
    e_out = pointwise(w["emb_layers.1.weight"], w["emb_layers.1.bias"], silu(e.numpy())[..., None])
    norm = w["out_layers.0.weight"], w["out_layers.0.bias"], 1e-5
    h = group_norm(h, *norm) * (1 + e_out[:, :c]) + e_out[:, c:] if scale_shift else group_norm(h + e_out, *norm)
    expected = flat + pointwise(w["out_layers.3.weight"][..., 1, 1], w["out_layers.3.bias"], silu(h))
    assert_allclose(originals.res_block(state, "x", x, e)[..., 0], expected, atol=1e-12)


def test_res_block_changes_the_size():
    """An image of equal pixels stays equal-pixeled but for its rim, where the convolutions see zeros."""
    state, _ = layer(block_shapes(64, 64))
    x, e = noise(1, 64, 1, 1).double().expand(1, 64, 16, 16), noise(1, 16, seed=1).double()
    plain, half, double = (originals.res_block(state, "x", x, e, size) for size in ("plain", "half", "double"))
    assert (half.shape[-1], plain.shape[-1], double.shape[-1]) == (8, 16, 32)
    bumpy = noise(1, 64, 4, 4).double()
    repeated = bumpy.numpy().repeat(2, 2).repeat(2, 3)
    result = originals.res_block(state, "x", torch.from_numpy(repeated), e, "half")
    assert_allclose(result, originals.res_block(state, "x", bumpy, e), atol=1e-12)
    h = originals.res_block(state, "x", bumpy, e, "double") - torch.from_numpy(repeated)
    assert h.std() > 0.1
    assert not torch.equal(h[..., ::2, ::2], h[..., 1::2, 1::2])


def test_feed_forward_gates_with_the_second_half():
    state, w = layer(
        {"net.0.proj.weight": (48, 8), "net.0.proj.bias": (48,), "net.2.weight": (8, 24), "net.2.bias": (8,)}
    )
    x = noise(2, 5, 8).double()
    h = x.numpy() @ w["net.0.proj.weight"].T + w["net.0.proj.bias"]
    value, gate = h[..., :24], h[..., 24:]
    gelu = gate * 0.5 * (1 + np.vectorize(math.erf)(gate / math.sqrt(2)))
    expected = value * gelu @ w["net.2.weight"].T + w["net.2.bias"]
    assert_allclose(originals.feed_forward(state, "x", x), expected, atol=1e-12)


def test_ddim_pads_only_below_and_right():
    state, w = layer({"weight": (1, 1, 3, 3), "bias": (1,)})
    x = noise(1, 1, 4, 4).double()
    padded = np.pad(x.numpy()[0, 0], ((0, 1), (0, 1)))
    expected = [[(padded[i : i + 3, j : j + 3] * w["weight"]).sum() + w["bias"][0] for j in (0, 2)] for i in (0, 2)]
    assert_allclose(originals.halve(state, "x", x)[0, 0], expected, atol=1e-12)


def test_nearest_code_is_the_nearest():
    codebook, z = noise(50, 3).double(), noise(2, 3, 4, 4, seed=1).double()
    distance = ((z.numpy()[:, None] - codebook.numpy()[None, :, :, None, None]) ** 2).sum(2)
    assert_allclose(originals.nearest_codes(codebook, z), distance.argmin(1))


# Names and made-up weights


@pytest.mark.parametrize("name", COUNTS)
def test_manifest_has_the_published_size(name: str):
    shapes = originals.manifest(name)
    assert (len(shapes), sum(math.prod(s) for s in shapes.values())) == COUNTS[name]


@pytest.mark.parametrize(("name", "n"), [("ldm-lsun-bedrooms256", 368), ("ldm-lsun-churches256", 520)])
def test_every_average_has_its_own_name(name: str, n: int):
    shapes = originals.manifest(name)
    squeezed = {originals.squeezed(k): shape for k, shape in shapes.items() if k.startswith("model.")}
    kept = {k: s for k, s in shapes.items() if k.startswith("model_ema.")}
    assert squeezed | {"model_ema.decay": (), "model_ema.num_updates": ()} == kept
    assert len(squeezed) == n


def test_squeezed_name():
    name = "model.diffusion_model.time_embed.0.weight"
    assert originals.squeezed(name) == "model_ema.diffusion_modeltime_embed0weight"


@pytest.mark.parametrize("name", COUNTS)
def test_shrunk_leaves_what_has_no_width(name: str):
    full = originals.manifest(name)
    small = originals.shrunk(full, 32, first_stage_width=32)
    assert small.keys() == full.keys()
    changed = {k.split(".")[0] for k in full if small[k] != full[k]}
    assert not changed & {"loss", "betas", "scale_factor", "cond_stage_model", "quantize", "quant_conv"}
    norms = [
        s for k, s in small.items() if len(s) == 1 and k.endswith(("norm1.weight", "norm.weight", "layers.0.weight"))
    ]
    assert all(n % 32 == 0 for (n,) in norms)
    if name.startswith("ldm"):
        kept = originals.shrunk(full, 32)
        assert originals.below(kept, "first_stage_model.") == originals.below(full, "first_stage_model.")


def test_shrunk_divides_every_width_alike():
    small = originals.shrunk(originals.manifest("ldm-cin256-v2"), 32, first_stage_width=64)
    assert small["model.diffusion_model.time_embed.0.weight"] == (128, 32)
    assert small["model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"] == (160, 512)
    assert small["first_stage_model.encoder.mid.attn_1.q.weight"] == (256, 256, 1, 1)
    assert small["first_stage_model.quantize.embedding.weight"] == (8192, 3)
    assert small["cond_stage_model.embedding.weight"] == (1001, 512)


def test_random_state_is_what_the_published_files_hold():
    shapes = originals.shrunk(originals.manifest("ldm-lsun-churches256"), 32, first_stage_width=32)
    state = originals.random_state(shapes, linear_end=0.0155)
    assert {k: tuple(v.shape) for k, v in state.items()} == shapes
    weights = [k for k in shapes if k.startswith("model.")]
    assert not any(torch.equal(state[k], state[originals.squeezed(k)]) for k in weights)
    assert all(originals.averaged(state)[k] is state[originals.squeezed(k)] for k in weights)
    assert 0 < state["scale_factor"] < 1
    again = originals.random_state(shapes, linear_end=0.0155)
    assert all(torch.equal(v, again[k]) for k, v in state.items())
    assert not torch.equal(originals.random_state(shapes, seed=1)[weights[0]], state[weights[0]])


def test_schedule():
    """sqrt-spaced betas, and the posterior's formulas (arXiv:2006.11239, Eqs. 6 and 7)."""
    s = {k: v.double().numpy() for k, v in originals.schedule(linear_end=0.0155).items()}
    roots = np.sqrt(s["betas"])
    assert_allclose([s["betas"][0], s["betas"][-1]], [0.0015, 0.0155], rtol=1e-6)
    assert_allclose(np.diff(roots), (math.sqrt(0.0155) - math.sqrt(0.0015)) / 999, rtol=1e-3)
    assert_allclose(s["alphas_cumprod"], np.cumprod(1 - s["betas"]), rtol=1e-5)
    x0, xt = s["posterior_mean_coef1"], s["posterior_mean_coef2"]
    assert_allclose(x0 + xt * s["sqrt_alphas_cumprod"], np.sqrt(s["alphas_cumprod_prev"]), rtol=1e-5)
    assert len(s) == 12
    assert {len(v) for v in s.values()} == {1000}
