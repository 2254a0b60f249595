"""What tests share: a home directory of their own, the entry point, the tiny recipes, and teachers for them."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bdm_cli import cli, places, recipe
from bdm_cli.recipe import Recipe

RECIPES = Path(__file__).parent / "recipes"

Bdm = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home directory, so that no test writes into the checkout."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("BDM_HOME", str(folder))
    return folder


@pytest.fixture
def bdm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Bdm:
    """bdm("train", "--recipe", ...) -> (exit code, stdout, stderr) of the entry point."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bdm", *arguments])
        with pytest.raises(SystemExit) as exit:
            cli.entry()
        out, err = capsys.readouterr()
        return int(exit.value.code or 0), out, err

    return call


@pytest.fixture
def tiny_recipe() -> Callable[..., Recipe]:
    """tiny_recipe(*overrides, name="tiny-w1a4", method=None): a recipe of tests/recipes/."""

    def load(*overrides: str, name: str = "tiny-w1a4", method: str | None = None) -> Recipe:
        return recipe.load(str(RECIPES / f"{name}.toml"), overrides, method)

    return load


@pytest.fixture
def tiny_teacher(tiny_recipe: Callable[..., Recipe]) -> Path:
    """The teacher's file of the tiny recipes, with random weights, where they look for it."""
    return random_teacher(tiny_recipe(name="tiny"))


@pytest.fixture
def tiny_ldm_teacher(tiny_recipe: Callable[..., Recipe]) -> Path:
    """As tiny_teacher, of tiny-ldm: latents of a variational first stage, unconditional."""
    return random_teacher(tiny_recipe(name="tiny-ldm"))


@pytest.fixture
def tiny_cond_teacher(tiny_recipe: Callable[..., Recipe]) -> Path:
    """As tiny_teacher, of tiny-cond: latents of a vector-quantized first stage, told a class."""
    return random_teacher(tiny_recipe(name="tiny-cond"))


def random_teacher(recipe: Recipe) -> Path:
    """Writes the recipe's network with random weights where the recipe looks for its teacher."""
    import torch

    from bdm_cli import student
    from bdm_cli.diffusion.models import build_unet

    spec = recipe.pretraining()
    path = places.locate(recipe.model.pretrained)
    torch.manual_seed(0)
    student.save(path, build_unet(spec.unet), spec, seed=0, step=0)
    return path


@pytest.fixture(params=["torch", "default"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Packed layers by the path that needs no compiler, then by the one that is chosen here."""
    from bdm_cli.packed import ops

    if request.param == "torch":
        monkeypatch.setenv("BDM_KERNEL", "torch")
    else:
        monkeypatch.delenv("BDM_KERNEL", raising=False)
    ops.path.cache_clear()
    yield request.param
    ops.path.cache_clear()
