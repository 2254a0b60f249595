"""Where a recipe's inputs lie, and what is missing: checked before the first heavy import."""

from pathlib import Path

from bdm_cli.errors import BdmError
from bdm_cli.places import locate
from bdm_cli.pretrained import is_hub_id
from bdm_cli.recipe import Recipe


def missing(recipe: Recipe, evaluation: bool = False) -> list[str]:
    """One entry for each input that is not there: what it is, where it belongs, how to get it.

    evaluation: also what `bdm evaluate` compares with, which training does not need.
    """
    teacher = recipe.model.pretrained
    wanted = [
        ("full-precision teacher", "" if is_hub_id(teacher) else teacher, "model.pretrained", recipe.model.get_it)
    ]
    if not (recipe.data.latents and (locate(recipe.data.latents) / "cache.json").exists()):
        wanted.insert(0, ("training images", recipe.data.path, "data.path", recipe.data.get_it))
    if recipe.first_stage:
        wanted.append(("first stage", recipe.first_stage.path, "first_stage.path", recipe.first_stage.get_it))
    if evaluation:
        e = recipe.evaluate
        wanted.append(("reference of the evaluation", e.reference, "evaluate.reference", e.get_it))
    return [
        f"{what}: put it at {locate(path)} (or --set {key}=PATH)\n    get it: {get_it}"
        for what, path, key, get_it in wanted
        if path and not locate(path).exists()
    ]


def reference(recipe: Recipe) -> Path:
    """Where evaluate.reference lies. Raises: BdmError that says where to get it, if it is not there."""
    path = locate(recipe.evaluate.reference)
    if not path.exists():
        raise BdmError(
            f"evaluate.reference: there is nothing at {path}.\n"
            f"  get it: {recipe.evaluate.get_it or 'an npz with arr_0, or a folder of images'}\n"
            "  or use the training images: --set evaluate.reference=''"
        )
    return path


def require(recipe: Recipe) -> None:
    """Raises: BdmError that names every missing input, where to get it and where to put it."""
    lacking = missing(recipe)
    if lacking:
        count = "an input" if len(lacking) == 1 else f"{len(lacking)} inputs"
        lines = [f"recipe '{recipe.name}' lacks {count} (nothing was started):", *(f"  {entry}" for entry in lacking)]
        lines.append("  without them: --rehearse runs the real network for a few steps; digits-w1a4 needs no download")
        raise BdmError("\n".join(lines))
