"""Where inputs lie, what is missing, and what images a name stands for: checked before the first heavy import."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bdm_cli import recipe as recipes
from bdm_cli import runs
from bdm_cli.errors import BdmError, nearest
from bdm_cli.places import locate
from bdm_cli.pretrained import is_hub_id
from bdm_cli.recipe import DATA_FREE, Evaluate, Recipe


def missing(recipe: Recipe, evaluation: bool = False) -> list[str]:
    """One entry for each input that is not there: what it is, where it belongs, how to get it.

    evaluation: also what `bdm evaluate` compares with, which training does not need.
    """
    teacher = recipe.model.pretrained
    wanted = [
        ("full-precision teacher", "" if is_hub_id(teacher) else teacher, "model.pretrained", recipe.model.get_it)
    ]
    cached = recipe.data.latents and (locate(recipe.data.latents) / "cache.json").exists()
    if not cached and recipe.method["name"] not in DATA_FREE:
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


def reference_path(recipe: Recipe) -> Path:
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


SEEN = ("data.dataset", "data.path", "data.image_size", "data.channels", "data.corrupt")
"""What of [data] decides which reference images a recipe's samples are compared with."""


@dataclass(frozen=True)
class Source:
    """Images by what a user calls them. path: where files lie; None = the data set of `recipe`.

    A run's images have all three: the npz, the recipe it was trained and sampled with, its id.
    """

    text: str
    path: Path | None
    recipe: Recipe | None = None
    run_id: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """What `bdm evaluate` is asked to do.

    recorded: whether this is a run of ours by its own recipe, whose numbers become records.
    """

    samples: tuple[Source, ...]
    reference: Source | None
    settings: Evaluate
    recorded: bool


@dataclass(frozen=True)
class Exported:
    """What `bdm export` packs. weights: a finished student's file; None = random weights for `recipe`, by `seed`.

    recipe: None = the one in the file, under `overrides`.
    """

    weights: Path | None
    recipe: Recipe | None = None
    overrides: tuple[str, ...] = ()
    seed: int = 0


def exported(
    run: str | None, name: str | None, method: str | None, overrides: Sequence[str], seed: int, random: bool
) -> Exported:
    """What to pack: `run`, the id of a finished run or the path of its weights; or that of recipe `name` with `seed`.

    Raises: BdmError if there is none, neither or both are given, or random weights are asked for without a recipe.
    """
    if random:
        if name is None or run is not None:
            raise BdmError("--random takes a recipe alone.\n  e.g. bdm export --recipe bedrooms-w1a4 --random -o FILE")
        return Exported(None, recipes.load(name, overrides, method), seed=seed)
    if (run is None) == (name is None):
        raise BdmError("give either RUN or --recipe NAME (with --seed).\n  e.g. bdm export digits-w1a4-s0 -o FILE")
    if run is not None and method is not None:
        raise BdmError("--method is for --recipe; a run has its own.\n  leave out --method")
    if run is not None and (os.sep in run or run.endswith(".safetensors")):
        path = Path(run)
        if not path.is_file():
            raise BdmError(f"there is no file {path}.\n  give a finished run's id, or the path of its weights")
        return Exported(path, overrides=tuple(overrides))
    spec, run_id = runs.target(run, name, method, overrides, seed)
    return Exported(runs.weights(run_id), spec)


def source(text: str, overrides: Sequence[str] = ()) -> Source:
    """What `text` names: a finished run (its id, or its folder below runs/), a recipe (its data set), else files.

    A file or folder that is called like a run or a recipe is written with its folder: ./digits.
    overrides: `sample.*` and `evaluate.*` for a run, any for a recipe.
    Raises: BdmError if it is none of these, or the run has no such samples.
    """
    path, bare = Path(text).expanduser(), os.sep not in text
    folder = path if bare else path.resolve()
    if (bare or folder.parent == runs.runs_dir().resolve()) and runs.recipe_copy(folder.name).exists():
        spec, run_id = runs.target(folder.name, None, None, overrides, 0)  # which tells of a run that is not finished
        return _samples(spec, run_id)
    if (bare and text in recipes.names()) or path.suffix == ".toml":
        return Source(text, None, recipes.load(text if bare else str(path), overrides))
    if not path.exists():
        finished = sorted(p.parent.name for p in runs.runs_dir().glob("*/weights.safetensors"))
        hint = nearest(text, [*recipes.names(), *finished]) if bare else ""
        raise BdmError(
            f"there are no images called '{text}'.{hint}\n"
            "  allowed: an npz, a folder, tar or LSUN lmdb of images; a finished run "
            f"({', '.join(finished) or 'there is none yet'}); a recipe, for its data set (bdm recipes)"
        )
    return Source(text, path)


def _samples(spec: Recipe, run_id: str) -> Source:
    path = runs.samples_npz(spec, run_id)
    if not path.exists():
        raise BdmError(
            f"run '{run_id}' has no images at {path}.\n"
            f"  make them: bdm sample --run {run_id} (with the same --set sample.*)"
        )
    return Source(run_id, path, spec, run_id)


def of_run(spec: Recipe, run_id: str) -> Evaluation:
    """A run's images by its own recipe. Raises: BdmError if they, or the reference, are not there."""
    return Evaluation((_samples(spec, run_id),), _own_reference(spec), spec.evaluate, recorded=True)


def _own_reference(spec: Recipe) -> Source | None:
    """What a recipe's images are compared with; None if none of its metrics does."""
    if not spec.evaluate.compares:
        return None
    if not spec.evaluate.reference:
        return Source(spec.data.dataset, None, spec)
    path = reference_path(spec)
    return Source(str(path), path)


def evaluation(
    given: Sequence[str],
    reference: str | None,
    name: str | None,
    method: str | None,
    seed: int | None,
    overrides: Sequence[str],
) -> Evaluation:
    """What to score, against what, how.

    given: sets of images; none = the run of recipe `name` with `seed`. The settings ([evaluate]) and, without
    `reference`, also what to compare with are those of the recipe `name`; else of the runs among `given`, which must
    agree; else of the recipe that `reference` is, or the first of `given`; else ADM's protocol on Inception's features.
    Raises: BdmError if something is not there, or the settings are not told.
    """
    if not given and name is None:
        raise BdmError(
            "nothing is given to score.\n  give a finished run, an npz, a folder or a tar of images; or --recipe NAME "
            "(with --seed), for that run"
        )
    if not given:
        own = of_run(*runs.target(None, name, method, overrides, seed or 0))
        samples, spec = own.samples, own.samples[0].recipe
    elif method is not None or seed is not None:
        option = "--seed" if method is None else "--method"
        raise BdmError(f"{option} chooses a run, with --recipe.\n  leave out {option}, or the images")
    else:
        samples = tuple(source(text, overrides) for text in given)
        spec = recipes.load(name, overrides) if name is not None else _agreed(samples)
    found = None if reference is None else source(reference, overrides)
    if spec is None and found is not None:
        spec = found.recipe
    base = spec or samples[0].recipe
    settings = recipes.evaluation(overrides) if base is None else base.evaluate
    asked = any(text.startswith("evaluate.prepare=") for text in overrides) and settings.prepare != "none"
    if asked and found is not None and found.path is not None and found.path.suffix == ".npz":  # a run's, too
        raise BdmError(
            f"{found.text} is taken as it is; --prepare is for a reference of image files.\n  leave out --prepare"
        )
    if found is None and spec is not None:
        found = _own_reference(spec)
    own_recipe = len(samples) == 1 and samples[0].run_id is not None and spec == samples[0].recipe
    return Evaluation(samples, found, settings, recorded=own_recipe and reference is None)


def _agreed(samples: Sequence[Source]) -> Recipe | None:
    """The recipe by which runs are scored. Raises: BdmError if theirs score differently."""
    of_runs = [each for each in samples if each.run_id is not None]
    for each in of_runs[1:]:
        first = of_runs[0]
        here, there = (recipes.resolved(one.recipe) for one in (first, each))
        keys = {*SEEN, *(key for key in here if key.startswith("evaluate.") and key != "evaluate.get_it")}
        differ = sorted(key for key in keys if here[key] != there[key])
        if differ:
            raise BdmError(
                f"the recipes of {first.text} and {each.text} score images differently: {', '.join(differ)}.\n"
                "  say by which recipe: --recipe NAME"
            )
    return of_runs[0].recipe if of_runs else None
