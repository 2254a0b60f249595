"""What tests share: a home directory of their own, the tiny recipes, and a teacher for them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from bdm_cli import inputs, recipe
from bdm_cli.recipe import Recipe

RECIPES = Path(__file__).parent / "recipes"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home directory, so that no test writes into the checkout."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("BDM_HOME", str(folder))
    return folder


@pytest.fixture
def tiny_recipe() -> Callable[..., Recipe]:
    """tiny_recipe(*overrides, name="tiny-w1a4", method=None): a recipe of tests/recipes/."""

    def load(*overrides: str, name: str = "tiny-w1a4", method: str | None = None) -> Recipe:
        return recipe.load(str(RECIPES / f"{name}.toml"), overrides, method)

    return load


@pytest.fixture
def tiny_teacher(tiny_recipe: Callable[..., Recipe]) -> Path:
    """The teacher's file of the tiny recipes, with random weights, where they look for it."""
    import torch

    from bdm_cli import student
    from bdm_cli.diffusion.models import build_unet

    spec = tiny_recipe(name="tiny").pretraining()
    path = inputs.locate(tiny_recipe(name="tiny").teacher.path)
    torch.manual_seed(0)
    student.save(path, build_unet(spec.unet), spec, seed=0, step=0)
    return path
