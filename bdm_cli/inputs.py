"""Where a recipe's inputs lie, and what is missing: checked before the first heavy import."""

from pathlib import Path

from bdm_cli import runs
from bdm_cli.errors import BdmError
from bdm_cli.recipe import Recipe

PACKAGE = "package:"


def locate(path: str) -> Path:
    """'package:x' lies in the package's weights folder; anything else below the home directory, unless absolute."""
    if path.startswith(PACKAGE):
        return Path(__file__).resolve().parent / "weights" / path.removeprefix(PACKAGE)
    return runs.home() / Path(path).expanduser()


def missing(recipe: Recipe) -> list[str]:
    """One entry for each input that is not there: what it is, where it belongs, how to get it."""
    wanted = [
        ("training images", recipe.data.path, "data.path", recipe.data.get_it),
        ("full-precision teacher", recipe.teacher.path, "teacher.path", recipe.teacher.get_it),
    ]
    if recipe.first_stage:
        wanted.append(("first stage", recipe.first_stage.path, "first_stage.path", recipe.first_stage.get_it))
    return [
        f"{what}: put it at {locate(path)} (or --set {key}=PATH)\n    get it: {get_it}"
        for what, path, key, get_it in wanted
        if path and not locate(path).exists()
    ]


def require(recipe: Recipe) -> None:
    """Raises: BdmError that names every missing input, where to get it and where to put it."""
    lacking = missing(recipe)
    if lacking:
        count = "an input" if len(lacking) == 1 else f"{len(lacking)} inputs"
        lines = [f"recipe '{recipe.name}' lacks {count} (nothing was started):", *(f"  {entry}" for entry in lacking)]
        if recipe.first_stage:
            lines.append(
                "  note: this version trains latent models only with --rehearse; it reads none of these files yet"
            )
        lines.append("  without them: --rehearse runs the real network for a few steps; digits-w1a4 needs no download")
        raise BdmError("\n".join(lines))
