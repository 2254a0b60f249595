"""Converted networks against the originals' own forward pass (originals.py), and what a checkpoint may not be."""

import contextlib
import operator
import os
import re
import sys
import types
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import originals
import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from bdm_cli import recipe
from bdm_cli.diffusion import convert, first_stage
from bdm_cli.diffusion.models import build_unet, estimate_noise
from bdm_cli.errors import BdmError
from bdm_cli.recipe import Recipe

UNET, STAGE, EMBEDDING = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.embedding.weight"


@dataclass(frozen=True)
class Network:
    """A published file, and the recipe overrides that shrink its networks to a width of 32.

    widths: of the U-Net's levels. stage: of the first stage's.
    tolerance: in float64. Only CIFAR-10's sides differ: both make the time embedding in float32, but round its sines'
        arguments in another order.
    """

    manifest: str
    widths: list[int]
    stage: list[int] | None = None
    heads: dict[str, int] = field(default_factory=dict)
    linear_end: float = 0.0195
    further: tuple[str, ...] = ()
    tolerance: float = 1e-10

    @property
    def overrides(self) -> list[str]:
        stage = [f"first_stage.arguments.block_out_channels={self.stage}"] if self.stage else []
        return [f"unet.arguments.block_out_channels={self.widths}", *stage, *self.further]


BEDROOMS = Network("ldm-lsun-bedrooms256", [32, 64, 96, 128], [32, 64, 128], {"head_width": 32})
NETWORKS = {
    "cifar10": Network("ddim-cifar10", [32, 64, 64, 64], tolerance=3e-6),
    "bedrooms": BEDROOMS,
    "ffhq": Network("ldm-ffhq256", BEDROOMS.widths, BEDROOMS.stage, BEDROOMS.heads),
    "churches": Network(
        "ldm-lsun-churches256",
        [32, 64, 64, 128, 128],
        [32, 64, 128, 128],
        {"heads": 8},
        linear_end=0.0155,
        further=("unet.arguments.attention_head_dim=4",),
    ),
    "imagenet": Network("ldm-cin256-v2", [32, 64, 96, 160], [32, 64, 128], {"heads": 1}),
}
LATENT = [name for name in NETWORKS if name != "cifar10"]
AVERAGED = ["bedrooms", "ffhq", "churches"]
"""The files that hold both raw and averaged weights."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small sums gain nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_recipe(name: str) -> Recipe:
    return recipe.load(name, NETWORKS[name].overrides)


@cache
def _small_state(name: str) -> dict[str, Tensor]:
    network = NETWORKS[name]
    shapes = originals.shrunk(originals.manifest(network.manifest), 32, first_stage_width=32)
    return originals.random_state(shapes, linear_end=network.linear_end)


def small_state(name: str) -> dict[str, Tensor]:
    """A dictionary of the test's own over tensors that it must leave as they are."""
    return dict(_small_state(name))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def double(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.double() for k, v in state.items() if v.is_floating_point()}


def original_noise(name: str, state: dict[str, Tensor], x: Tensor, t: Tensor, classes: Tensor | None) -> Tensor:
    if name == "cifar10":
        return originals.ddim_cifar(state, x, t)
    context = None if classes is None else state[EMBEDDING][classes][:, None]
    return originals.ldm_unet(originals.below(state, UNET), x, t, context, **NETWORKS[name].heads)


def inputs(name: str, side: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, t and classes for two images; a class, and the one that stands for none."""
    x = noise(2, 4 if name == "churches" else 3, side, side)
    return x, torch.tensor([11, 933]), torch.tensor([207, 1000]) if name == "imagenet" else None


def loaded(module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    module.load_state_dict(tensors, strict=True)
    return module.eval().requires_grad_(False)


def farthest(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    assert 1 < b.abs().max() < 10, "the tolerance means something for outputs of order 1"
    return (a - b).abs().max().item()


# The same outputs


@pytest.mark.parametrize("weights", ["ema", "raw"])
@pytest.mark.parametrize("name", NETWORKS)
def test_unet_computes_what_the_original_does(name: str, weights: str):
    """In float64, where a wrong eps (3e-5 here) or any other slip stands far above the rounding."""
    spec, state = small_recipe(name), small_state(name)
    unet = loaded(build_unet(spec.unet), convert.convert(spec, state, weights).unet).double()
    x, t, classes = inputs(name, 32 if name == "churches" else 16)
    y = estimate_noise(unet, x.double(), t, *(() if classes is None else (classes,)))
    used = originals.averaged(state) if weights == "ema" and name in AVERAGED else state
    assert farthest(y, original_noise(name, double(used), x.double(), t, classes)) < NETWORKS[name].tolerance


@pytest.mark.parametrize("name", ["bedrooms", "imagenet"])
def test_vq_inside_a_latent_model(name: str):
    spec, state = small_recipe(name), small_state(name)
    found = convert.convert(spec, state)
    assert found.scaling_factor == 1
    check_vq(loaded(first_stage.build(spec.first_stage), found.first_stage), originals.below(state, STAGE))


def test_kl_inside_a_latent_model():
    spec, state = small_recipe("churches"), small_state("churches")
    found = convert.convert(spec, state)
    assert found.scaling_factor == pytest.approx(0.22)
    check_kl(loaded(first_stage.build(spec.first_stage), found.first_stage), originals.below(state, STAGE))


@pytest.mark.parametrize(("name", "recipe_name", "check"), [("vq-f4", "bedrooms", "vq"), ("kl-f8", "churches", "kl")])
def test_first_stage_of_its_own_file(name: str, recipe_name: str, check: str):
    state = originals.random_state(originals.shrunk(originals.manifest(name), 32))
    assert any(k.startswith("loss.") for k in state)
    stage = first_stage.build(small_recipe(recipe_name).first_stage)
    stage = loaded(stage, convert.convert_first_stage(name, stage, state))
    {"vq": check_vq, "kl": check_kl}[check](stage, state)


def check_vq(stage: nn.Module, state: dict[str, Tensor]) -> None:
    stage, state, x = first_stage.FirstStage(stage.double()), double(state), noise(2, 3, 32, 32).double()
    z = originals.vq_encode(state, x)
    assert (stage.latents(stage.moments(x)) - z).abs().max() < 1e-10
    assert farthest(stage.decode(z), originals.vq_decode(state, z)) < 1e-10
    assert farthest(originals.vq_decode(state, z, quantize=False), originals.vq_decode(state, z)) > 1e-2


def check_kl(stage: nn.Module, state: dict[str, Tensor]) -> None:
    stage, state, x = first_stage.FirstStage(stage.double()), double(state), noise(2, 3, 32, 32).double()
    moments = originals.kl_moments(state, x)
    assert farthest(stage.moments(x), moments) < 1e-10
    z = moments[:, :4]
    assert farthest(stage.decode(z * stage.scale), originals.kl_decode(state, z)) < 1e-10


# The published sizes, in float32, one after the other


def full_state(name: str) -> dict[str, Tensor]:
    """As published; where averages are used, the raw weights are zeros that take no memory."""
    network = NETWORKS[name]
    shapes = originals.manifest(network.manifest)
    unused = {k: s for k, s in shapes.items() if k.startswith("model.") and name in AVERAGED}
    used = originals.random_state({k: s for k, s in shapes.items() if k not in unused}, linear_end=network.linear_end)
    return used | {k: torch.zeros(()).expand(s) for k, s in unused.items()}


@pytest.mark.parametrize(
    ("name", "n_parameters"),
    [("cifar10", 35_746_307), ("bedrooms", 274_056_163), ("churches", 294_966_916), ("imagenet", 400_920_579)],
)
def test_full_size(name: str, n_parameters: int):
    """FFHQ's networks are those of Bedrooms."""
    spec, state = recipe.load(name), full_state(name)
    found = convert.convert(spec, state)
    unet = _empty(lambda: build_unet(spec.unet), found.unet)
    assert sum(p.numel() for n, p in unet.named_parameters() if "class_embedder" not in n) == n_parameters
    x, t, classes = (None if y is None else y[:1] for y in inputs(name, 16))
    y = estimate_noise(unet, x, t, *(() if classes is None else (classes,)))
    if name in AVERAGED:
        state = originals.averaged(state)
    assert farthest(y, original_noise(name, state, x, t, classes)) < 1.5e-5
    if spec.first_stage is None:
        return
    stage = _empty(lambda: first_stage.build(spec.first_stage), found.first_stage)
    decode = originals.kl_decode if name == "churches" else originals.vq_decode
    z = noise(1, x.shape[1], 8, 8)
    decoded = stage.decode(z, return_dict=False)[0]
    assert farthest(decoded, decode(originals.below(state, STAGE), z)) < 4e-5


def _empty(build: Callable[[], nn.Module], tensors: dict[str, Tensor]) -> nn.Module:
    """The module around the tensors themselves, without weights of its own."""
    with torch.device("meta"):
        module = build()
    module.load_state_dict(tensors, strict=True, assign=True)
    return module.eval().requires_grad_(False)


NORMS = {
    "cifar10": {("GroupNorm", 1e-6): 51},
    "bedrooms": {("GroupNorm", 1e-5): 61},
    "ffhq": {("GroupNorm", 1e-5): 61},
    "churches": {("GroupNorm", 1e-5): 92},
    "imagenet": {("GroupNorm", 1e-5): 45, ("GroupNorm", 1e-6): 16, ("LayerNorm", 1e-5): 48},
}


def norms(module: nn.Module) -> Counter:
    found = [m for m in module.modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm)]
    assert {m.num_groups for m in found if isinstance(m, nn.GroupNorm)} == {32}
    return Counter((type(m).__name__, m.eps) for m in found)


@pytest.mark.parametrize("name", NETWORKS)
def test_eps_of_every_norm(name: str):
    spec = recipe.load(name)
    with torch.device("meta"):
        assert norms(build_unet(spec.unet)) == NORMS[name]
        if spec.first_stage is not None:
            n = 52 if name == "churches" else 42
            assert norms(first_stage.build(spec.first_stage)) == {("GroupNorm", 1e-6): n}


@pytest.mark.parametrize("name", NETWORKS)
def test_heads_of_every_attention(name: str):
    with torch.device("meta"):
        unet = build_unet(recipe.load(name).unet)
    attentions = [m for m in unet.modules() if isinstance(m, Attention)]
    assert len(attentions) == {"cifar10": 6, "churches": 21, "imagenet": 32}.get(name, 16)
    for attention in attentions:
        width = attention.to_q.out_features
        heads = {"cifar10": 1, "churches": 8, "imagenet": 1}.get(name, width // 32)
        assert (attention.heads, attention.scale) == (heads, pytest.approx((width / heads) ** -0.5))


# Which weights


@pytest.mark.parametrize("name", AVERAGED)
def test_averages_are_the_default(name: str):
    spec, state = small_recipe(name), small_state(name)
    shadow = state["model_ema.diffusion_modelinput_blocks00weight"]
    assert torch.equal(convert.convert(spec, state).unet["conv_in.weight"], shadow)
    raw = convert.convert(spec, state, "raw")
    assert torch.equal(raw.unet["conv_in.weight"], state["model.diffusion_model.input_blocks.0.0.weight"])
    assert (convert.convert(spec, state).averaged, raw.averaged) == (True, False)


def without_averages(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if not k.startswith("model_ema.")}


def test_averages_that_are_not_there():
    spec, state = small_recipe("bedrooms"), without_averages(small_state("bedrooms"))
    with pytest.raises(BdmError, match=r"(?s)no averaged weights \(model_ema.*raw"):
        convert.convert(spec, state)
    assert convert.convert(spec, state, "raw").averaged is False


@pytest.mark.parametrize("name", ["cifar10", "imagenet"])
def test_files_with_one_set_of_weights(name: str):
    spec, state = small_recipe(name), small_state(name)
    by_default, raw = convert.convert(spec, state).unet, convert.convert(spec, state, "raw").unet
    assert all(torch.equal(raw[k], v) for k, v in by_default.items())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_state_is_left_as_it_is(name: str):
    before = {k: v.clone() for k, v in small_state(name).items()}
    state = small_state(name)
    convert.convert(small_recipe(name), state)
    assert state.keys() == before.keys()
    assert all(torch.equal(state[k], v) for k, v in before.items())


def test_half_precision_becomes_single():
    spec, state = small_recipe("cifar10"), small_state("cifar10")
    found = convert.convert(spec, {k: v.half() for k, v in state.items()}).unet
    assert torch.equal(found["conv_in.weight"], state["conv_in.weight"].half().float())
    assert {v.dtype for v in found.values()} == {torch.float32}


# What is refused


def one_of_each_kind(names: list[str]) -> list[str]:
    """The last of the names that are equal but for their numbers."""
    return list({re.sub(r"\d+", "#", name): name for name in names}.values())


def needed(name: str) -> list[str]:
    state = small_state(name)
    kept = [k for k in state if "." in k and k not in ("model_ema.decay", "model_ema.num_updates")]
    return one_of_each_kind(kept) + (["scale_factor"] if name == "churches" else [])


@pytest.fixture
def same_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a test converts often: the networks without weights that tell the wanted names are made once."""
    for module, function in ((convert, "build_unet"), (first_stage, "build")):
        made, build = {}, getattr(module, function)

        def remembered(spec: object, made: dict = made, build: Callable = build) -> nn.Module:
            key = spec.model_dump_json()
            if key not in made:
                made[key] = build(spec)
            return made[key]

        monkeypatch.setattr(module, function, remembered)


SWEPT = pytest.mark.parametrize("name", [name for name in NETWORKS if name != "ffhq"])
"""FFHQ's tensors are those of Bedrooms."""


def refused(name: str, state: dict[str, Tensor]) -> str | None:
    """What the error says; None if there is none."""
    try:
        convert.convert(small_recipe(name), state)
    except BdmError as error:
        return str(error)
    return None


@SWEPT
@pytest.mark.usefixtures("same_networks")
def test_a_missing_tensor(name: str):
    quiet = []
    for lost in needed(name):
        state = small_state(name)
        del state[lost]
        if "missing" not in (refused(name, state) or ""):
            quiet.append(lost)
    assert not quiet


@SWEPT
@pytest.mark.usefixtures("same_networks")
def test_a_renamed_tensor(name: str):
    quiet = []
    for old in needed(name):
        state = small_state(name)
        state[f"{old}s"] = state.pop(old)
        if refused(name, state) is None:
            quiet.append(old)
    assert not quiet


@SWEPT
@pytest.mark.usefixtures("same_networks")
def test_a_tensor_of_another_shape(name: str):
    quiet = []
    for bad in set(needed(name)) - {"scale_factor"}:
        state = small_state(name)
        state[bad] = torch.cat([state[bad]] * 2)
        if "of another shape" not in (text := refused(name, state) or "") and "unexpected" not in text:
            quiet.append(bad)
    assert not quiet


def neighbours(name: str) -> Iterator[tuple[str, str]]:
    """Names like this one with another number, or with the name of a layer that stands elsewhere; and each's kind."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        for n in ("0", "1", "2", "99") if part.isdigit() else ():
            before, after = ".".join([*parts[:i], ""]), ".".join(["", *parts[i + 1 :]])
            yield before + n + after, re.sub(r"\d+", "#", before) + n + re.sub(r"\d+", "#", after)
    for a, b in (("downsample", "upsample"), ("in_layers.2", "op"), ("in_layers.2", "conv"), ("conv1", "norm_out")):
        yield from ((other, other) for x, y in ((a, b), (b, a)) if (other := name.replace(x, y)) != name)


@SWEPT
@pytest.mark.usefixtures("same_networks")
def test_a_tensor_too_many(name: str):
    """Also where it would, by a rule for its neighbours, take the place of a tensor that is there."""
    state = small_state(name)
    weights = [like for like in needed(name) if like.endswith("weight")]
    found = [(kind, extra, like) for like in weights for extra, kind in neighbours(like) if extra not in state]
    candidates = {kind: (extra, like) for kind, extra, like in found}.values()
    assert len(candidates) > 20
    quiet = [new for new, like in candidates if refused(name, state | {new: torch.zeros_like(state[like])}) is None]
    assert not quiet


@pytest.mark.parametrize(
    "prefix", [UNET, "model_ema.", STAGE, "cond_stage_model.", "cond_stage_model.embedding.", "other."]
)
@pytest.mark.parametrize("name", LATENT)
@pytest.mark.usefixtures("same_networks")
def test_an_unknown_tensor(name: str, prefix: str):
    text = refused(name, small_state(name) | {f"{prefix}extra": torch.zeros(3)})
    assert text is not None
    assert "unexpected" in text
    assert "extra" in text


@pytest.mark.parametrize("name", LATENT)
def test_leftovers_without_a_dot_are_ignored(name: str):
    spec, state = small_recipe(name), small_state(name)
    plain = convert.convert(spec, state)
    found = convert.convert(spec, state | {k: torch.zeros(200) for k in originals.LEFTOVERS})
    assert set(found.ignored) - set(plain.ignored) == set(originals.LEFTOVERS)
    assert all(torch.equal(v, plain.unet[k]) for k, v in found.unet.items())


def test_a_name_of_the_result_beside_the_original():
    state = small_state("cifar10")
    text = refused("cifar10", state | {"conv_norm_out.weight": torch.zeros_like(state["norm_out.weight"])})
    assert text is not None


@pytest.mark.parametrize(
    ("file", "model"),
    [
        ("bedrooms", "churches"),
        ("bedrooms", "cifar10"),
        ("bedrooms", "imagenet"),
        ("churches", "ffhq"),
        ("imagenet", "bedrooms"),
        ("cifar10", "churches"),
        ("cifar10", "imagenet"),
    ],
)
def test_another_model(file: str, model: str):
    """As published, but for the values."""
    state = {k: torch.zeros(()).expand(shape) for k, shape in originals.manifest(NETWORKS[file].manifest).items()}
    with pytest.raises(BdmError):
        convert.convert(recipe.load(model), state)
    with pytest.raises(BdmError, match=rf"not the model '{model}' \(it looks like .*{file}"):
        convert.convert(recipe.load(model), state, "raw")


def test_the_codebook_of_another_first_stage():
    state = small_state("bedrooms")
    state["first_stage_model.quantize.embedding.weight"] = torch.zeros(16384, 3)
    assert "quantize.embedding.weight [16384, 3] (wanted: [8192, 3])" in refused("bedrooms", state)


def test_another_schedule():
    state = small_state("churches") | originals.schedule(linear_end=0.0195)
    assert "another noise schedule" in refused("churches", state)


def test_scale_factor_has_no_default():
    state = small_state("churches")
    del state["scale_factor"]
    assert "scale_factor" in refused("churches", state)


# Reading files


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


CALLBACKS = "pytorch_lightning.callbacks.model_checkpoint"


@pytest.fixture
def lightning_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """lightning_file(state, **more): a file as pytorch_lightning writes it, which has a class of its own as a key.

    more: further entries. The package is there only while the file is written.
    """

    def write(state: dict[str, Tensor], **more: object) -> Path:
        with monkeypatch.context() as patch:
            for name in ("pytorch_lightning", "pytorch_lightning.callbacks", CALLBACKS):
                patch.setitem(sys.modules, name, types.ModuleType(name))
            for kind in (ModelCheckpoint, Settings):
                setattr(sys.modules[CALLBACKS], kind.__name__, kind)
            kept = {
                "monitor": "val/loss_simple_ema",
                "best_model_score": torch.tensor(0.15),
                "best_model_path": "x.ckpt",
            }
            content = {
                "epoch": 4,
                "global_step": 500_000,
                "pytorch-lightning_version": "1.4.2",
                "callbacks": {ModelCheckpoint: kept},
                "optimizer_states": [],
                "state_dict": state,
            }
            torch.save(content | more, tmp_path / "model.ckpt")
        return tmp_path / "model.ckpt"

    return write


class ModelCheckpoint:
    """As if of pytorch_lightning."""

    __module__ = CALLBACKS


class Settings:
    """Likewise; pickled with its attributes."""

    __module__ = CALLBACKS

    def __init__(self) -> None:
        self.monitor = "val/loss"


MORE = {
    "nothing more": {},
    "an object of Lightning's": {"hyper_parameters": Settings()},
    # what torch's LambdaLR keeps of a schedule like ldm/lr_scheduler.py's, with which LSUN-Churches was trained
    "numbers of NumPy": {"lr_schedulers": [{"last_epoch": 1, "_last_lr": [np.float64(5e-5)]}]},
}


@pytest.mark.parametrize("more", MORE.values(), ids=MORE)
def test_lightning_is_not_needed(lightning_file: Callable[..., Path], more: dict[str, object]):
    state = small_state("churches")
    assert same(convert.read(lightning_file(state, **more)), state)
    assert not any(name.startswith("pytorch_lightning") for name in sys.modules)


ZIP = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])


@ZIP
def test_bare_state_dict(tmp_path: Path, zipped: bool):
    state = small_state("cifar10")
    torch.save(state, tmp_path / "model-790000.ckpt", _use_new_zipfile_serialization=zipped)
    assert same(convert.read(tmp_path / "model-790000.ckpt"), state)


@pytest.fixture
def training_file(tmp_path: Path) -> tuple[Path, dict[str, Tensor], dict[str, Tensor]]:
    """ermongroup's [model, optimizer, epoch, step, average], whose model is wrapped; the raw and the averaged state."""
    raw, averaged = (
        originals.random_state(originals.shrunk(originals.manifest("ddim-cifar10"), 32), s) for s in (0, 1)
    )
    parameters = [nn.Parameter(v.clone()) for v in raw.values()]
    optimizer = torch.optim.Adam(parameters)
    sum(p.sum() for p in parameters).backward()
    optimizer.step()
    content = [{f"module.{k}": v for k, v in raw.items()}, optimizer.state_dict(), 7, 1000, averaged]
    torch.save(content, tmp_path / "ckpt.pth")
    return tmp_path / "ckpt.pth", raw, averaged


def test_training_file_gives_the_average(training_file: tuple[Path, dict, dict]):
    path, raw, averaged = training_file
    assert same(convert.read(path), averaged)
    assert same(convert.read(path, "raw"), raw)


def test_training_file_whose_average_has_the_prefix(tmp_path: Path):
    state = small_state("cifar10")
    wrapped = {f"module.{k}": v for k, v in state.items()}
    torch.save([wrapped, {}, 0, 1, wrapped], tmp_path / "ckpt.pth")
    assert same(convert.read(tmp_path / "ckpt.pth"), state)


class Call:
    """Pickled as the call of a function."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable, tuple]:
        return self.call


@ZIP
@pytest.mark.parametrize("function", ["os.mkdir", "os.system", "builtins.exec", "operator.attrgetter"])
def test_code_in_a_file_does_not_run(tmp_path: Path, function: str, zipped: bool):
    made = tmp_path / "made"
    calls = {
        "os.mkdir": Call(os.mkdir, str(made)),
        "os.system": Call(os.system, f"mkdir '{made}'"),
        "builtins.exec": Call(exec, f"import os; os.mkdir({str(made)!r})"),
        "operator.attrgetter": Call(operator.attrgetter, "x"),
    }
    content = {"state_dict": small_state("cifar10"), "hook": calls[function]}
    torch.save(content, tmp_path / "model.ckpt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(BdmError, match="code"):
        convert.read(tmp_path / "model.ckpt")
    assert not made.exists()


def test_code_under_an_innocent_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A name that is passed over is not looked up, though a module of that name be there."""
    made = tmp_path / "made"
    with monkeypatch.context() as patch:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", CALLBACKS):
            patch.setitem(sys.modules, name, types.ModuleType(name))

        def trap(path: str) -> None:
            Path(path).mkdir()

        trap.__module__, trap.__qualname__ = CALLBACKS, "ModelCheckpoint"
        sys.modules[CALLBACKS].ModelCheckpoint = trap
        torch.save({"state_dict": small_state("cifar10"), "hook": Call(trap, str(made))}, tmp_path / "model.ckpt")
        with contextlib.suppress(BdmError):
            convert.read(tmp_path / "model.ckpt")
    assert not made.exists()


@ZIP
def test_a_file_cut_short(tmp_path: Path, zipped: bool):
    path = tmp_path / "model.ckpt"
    torch.save(small_state("cifar10"), path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for n in (0, 1, 10, 300, 5_000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:n])
        with pytest.raises(BdmError, match=r"model\.ckpt"):
            convert.read(path)


@pytest.mark.parametrize(
    "content",
    [
        [1, 2, 3, 4, 5],
        [{}, {}, 0, 1],
        {},
        {"state_dict": {}},
        {"state_dict": [1]},
        {"state_dict": {"a": 1}},
        {1: torch.zeros(1)},
        torch.zeros(3),
        None,
        "text",
    ],
    ids=repr,
)
def test_a_file_of_something_else(tmp_path: Path, content: object):
    torch.save(content, tmp_path / "model.ckpt")
    with pytest.raises(BdmError):
        convert.read(tmp_path / "model.ckpt")


@pytest.mark.parametrize("content", [b"<!DOCTYPE html>", b"\x80\x02]q\x00.", b"PK\x03\x04", b"\x00" * 100])
def test_a_file_that_torch_did_not_write(tmp_path: Path, content: bytes):
    (tmp_path / "model.ckpt").write_bytes(content)
    with pytest.raises(BdmError):
        convert.read(tmp_path / "model.ckpt")


def test_an_archive_is_to_be_unpacked(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "churches.zip", "w") as archive:
        archive.writestr("model.ckpt", b"...")
    with pytest.raises(BdmError, match="unpack"):
        convert.read(tmp_path / "churches.zip")


def test_no_file(tmp_path: Path):
    with pytest.raises(BdmError, match="there is no file"):
        convert.read(tmp_path / "model.ckpt")


def test_read_and_convert(lightning_file: Callable[..., Path]):
    """From the file to the networks, as `bdm import` goes."""
    spec, state = small_recipe("imagenet"), small_state("imagenet")
    found, expected = (convert.convert(spec, s) for s in (convert.read(lightning_file(state)), state))
    assert same(found.unet, expected.unet)
    assert same(found.first_stage, expected.first_stage)
    assert torch.equal(found.unet["class_embedder.weight"], state[EMBEDDING])
