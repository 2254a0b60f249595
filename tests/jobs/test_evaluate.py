"""`bdm evaluate` on the digits: what is scored against what, records, the cache, kills, several processes, refusals."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from bdm_cli import inputs, recipe, records, runs, tensorfile
from bdm_cli.diffusion.data import reference_images
from bdm_cli.errors import BdmError
from bdm_cli.images import sets
from bdm_cli.images.prepare import prepared
from bdm_cli.jobs import evaluate
from bdm_cli.metrics import protocols
from bdm_cli.metrics.extraction import SHARD
from bdm_cli.metrics.inception import CLEAN, INCEPTION, VGG
from bdm_cli.recipe import Recipe

TITLES = ["FID", "sFID", "IS", "Prec.", "Recall"]
DIGITS = ("evaluate.features=digits",)
"""Settings of images of no recipe."""


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    return reference_images(recipe.load("digits"))[:]


def noisy(images: np.ndarray, seed: int = 0, by: int = 40) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(-by, by + 1, images.shape)
    return (images.astype(int) + noise).clip(0, 255).astype(np.uint8)


def save(path: Path, images: np.ndarray, **more: np.ndarray) -> Path:
    np.savez(path, images, **more)
    return path


def save_folder(path: Path, images: np.ndarray) -> Path:
    path.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(path / f"{i:04d}.png")
    return path


def scored(
    *samples: object,
    reference: object = None,
    name: str | None = "digits",
    overrides: Sequence[str] = (),
    weights: Path | None = None,
    batch: int = 64,
    resamples: int = 0,
) -> pd.DataFrame:
    """By the recipe `digits`, unless told otherwise."""
    against = None if reference is None else str(reference)
    asked = inputs.evaluation([str(each) for each in samples], against, name, None, None, overrides)
    return evaluate.run(asked, weights, batch, resamples)


def values(table: pd.DataFrame) -> dict[str, float]:
    return dict(zip(table["Metric"], table["Value"], strict=True))


def features_dir() -> Path:
    return runs.cache_dir() / "features"


def passes() -> dict[str, int]:
    """The files of all sets whose features are kept, and when each was written."""
    files = [path for path in features_dir().glob("*/*") if path.name != "lock"]
    return {str(path.relative_to(features_dir())): path.stat().st_mtime_ns for path in files}


def finished(images: np.ndarray, name: str, *overrides: str, seed: int = 0) -> tuple[str, Recipe]:
    """The id and recipe of a run whose samples are these images."""
    spec = recipe.load(name, overrides)
    run_id = spec.run_id(seed)
    runs.write_text(runs.recipe_copy(run_id), spec.model_dump_json())
    runs.weights(run_id).touch()
    path = runs.samples_npz(spec, run_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, images)
    return run_id, spec


# scores


def test_real_digits_score_better_than_noisy_ones(home: Path, digits: np.ndarray):
    real = values(scored(save(home / "real.npz", digits[::2])))
    bad = values(scored(save(home / "noisy.npz", noisy(digits[::2]))))
    assert list(real) == TITLES
    assert real["FID"] < bad["FID"] / 3
    assert real["sFID"] < bad["sFID"] / 3
    assert 8 < real["IS"] <= 10
    assert real["Prec."] == 100  # they are reference images
    assert real["Prec."] > bad["Prec."]
    assert records.read() == []


def test_the_reference_itself_has_distance_zero(home: Path, digits: np.ndarray):
    path = save(home / "all.npz", digits)
    for samples, reference in ((path, None), ("digits", None), ("digits", path), (path, path)):
        found = values(scored(samples, reference=reference))
        assert found["FID"] == pytest.approx(0, abs=1e-4)
        assert found["sFID"] == pytest.approx(0, abs=1e-4)
        assert found["Prec."] == found["Recall"] == 100


def test_an_npz_a_folder_and_a_tar_of_the_same_images_score_the_same(home: Path, digits: np.ndarray):
    chosen = noisy(digits[:80])
    folder = save_folder(home / "folder", chosen)
    with tarfile.open(home / "a.tar", "w") as tar:
        tar.add(folder, "top")
    first = scored(save(home / "a.npz", chosen))
    assert scored(folder).equals(first)
    assert scored(home / "a.tar").equals(first)
    as_reference = scored("digits", reference=home / "a.npz")
    assert scored("digits", reference=folder).equals(as_reference)
    assert not as_reference.equals(first)


def test_batches_change_only_the_last_digits(home: Path, digits: np.ndarray):
    path = save(home / "a.npz", noisy(digits[:90]))
    first = scored(path, batch=64)
    for file in features_dir().glob("*/*"):
        file.unlink()
    again = scored(path, batch=7)
    for title in TITLES:
        assert values(again)[title] == pytest.approx(values(first)[title], rel=1e-4)


def test_the_table_says_what_was_measured(home: Path, digits: np.ndarray):
    table = scored(save(home / "a.npz", noisy(digits[:200])))
    assert list(table) == ["Metric", "Value", "Images", "Reference images", "Features", "Protocol", "Note"]
    assert table["Images"].tolist() == [200] * 5
    assert table["Reference images"].tolist() == [1797, 1797, None, 1797, 1797]
    assert set(table["Features"]) == {"bdm's digits network"}
    assert set(table["Protocol"]) == {"ADM"}
    assert scored(home / "a.npz", overrides=["evaluate.metrics=[]"]).empty


def test_metrics_are_those_that_are_asked_for_in_their_order(home: Path, digits: np.ndarray):
    path = save(home / "a.npz", noisy(digits[:200]))
    found = scored(path, overrides=["evaluate.metrics=['kid', 'fid']"])
    assert found["Metric"].tolist() == ["KID", "FID"]
    assert values(found)["FID"] == values(scored(path))["FID"]
    assert 0 < values(found)["KID"] < 10


def test_precision_recall_and_kid_may_rest_on_a_part_of_the_reference(home: Path, digits: np.ndarray):
    path = save(home / "a.npz", noisy(digits[:200]))
    metrics = "evaluate.metrics=['fid', 'sfid', 'is', 'precision', 'recall', 'kid']"
    whole = scored(path, overrides=[metrics])
    part = scored(path, overrides=[metrics, "evaluate.n_reference=100"])
    assert part["Reference images"].tolist() == [1797, 1797, None, 100, 100, 100]
    for title in ("FID", "sFID", "IS"):
        assert values(part)[title] == values(whole)[title]
    for title in ("Recall", "KID"):
        assert values(part)[title] != values(whole)[title]
    assert part.equals(scored(path, overrides=[metrics, "evaluate.n_reference=100"]))


def test_the_inception_score_needs_no_reference(home: Path, digits: np.ndarray):
    path = save(home / "a.npz", noisy(digits[:200]))
    alone = scored(path, name=None, overrides=[*DIGITS, "evaluate.metrics=['is']"])
    assert values(alone) == {"IS": values(scored(path))["IS"]}
    assert alone["Reference images"].tolist() == [None]


def test_stored_statistics_of_a_reference_replace_those_of_its_images(home: Path, digits: np.ndarray):
    """For FID and sFID, as ADM does; precision and recall are of the images beside them."""
    samples = save(home / "a.npz", noisy(digits[:300]))
    full = values(scored(samples))
    (whole,) = (
        tensors
        for tensors, header in map(tensorfile.read, features_dir().glob("*/summary.safetensors"))
        if header["n"] == "1797"
    )
    names = {"mu": "pool.mu", "sigma": "pool.sigma", "mu_s": "spatial.mu", "sigma_s": "spatial.sigma"}
    stored = {name: whole[key].numpy() for name, key in names.items()}
    part = save(home / "part.npz", digits[:100])
    reference = save(home / "reference.npz", digits[:100], **stored)
    table = scored(samples, reference=reference)
    found, of_part = values(table), values(scored(samples, reference=part))
    for title in ("FID", "sFID"):
        assert found[title] == pytest.approx(full[title])
        assert found[title] != pytest.approx(of_part[title])
    for title in ("Prec.", "Recall"):
        assert found[title] == of_part[title]
    assert found["Recall"] != full["Recall"]
    assert table["Reference images"].tolist() == [None, None, None, 100, 100]
    assert table["Note"].tolist()[:2] == ["", ""]  # nobody knows of how many images they are
    by_recipe = scored(samples, overrides=[f"evaluate.reference={reference}"])
    assert values(by_recipe) == found


# references that are prepared


@pytest.mark.parametrize("how", ["adm-crop", "square-bicubic"])
def test_raw_images_of_a_reference_are_prepared_to_the_size_of_the_samples(home: Path, digits: np.ndarray, how: str):
    """20x24 images become 16x16; the same as of images that were prepared by hand."""
    random = np.random.default_rng(0)
    raw = [random.integers(0, 256, (24, 20), dtype=np.uint8) for _ in range(70)]
    by_hand = np.stack([prepared(Image.fromarray(image), how, 16, 1) for image in raw])
    folder = save_folder(home / "raw", np.stack(raw)[..., None])
    samples = save(home / "a.npz", noisy(digits[:80]))
    told = [*DIGITS, f"evaluate.prepare={how}"]
    found = scored(samples, reference=folder, name=None, overrides=told)
    expected = scored(samples, reference=save(home / "by_hand.npz", by_hand), name=None, overrides=DIGITS)
    assert values(found) == values(expected)
    assert found["Reference images"].tolist() == [70, 70, None, 70, 70]


def test_two_preparations_give_two_references(home: Path, digits: np.ndarray):
    folder = save_folder(home / "raw", np.random.default_rng(0).integers(0, 256, (70, 24, 20, 1), dtype=np.uint8))
    samples = save(home / "a.npz", noisy(digits[:80]))
    one, other = (
        values(scored(samples, reference=folder, overrides=[f"evaluate.prepare={how}"]))["FID"]
        for how in ("box-crop", "adm-crop")
    )
    assert one != other


def test_raw_images_without_a_preparation_are_refused(home: Path, digits: np.ndarray):
    folder = save_folder(home / "raw", np.zeros((70, 24, 20, 1), np.uint8))
    message = refused(save(home / "a.npz", digits[:80]), reference=folder)
    assert f"a.npz has images [16, 16, 1] (height, width, channels), {folder} has [24, 20, 1].\n" in message
    assert "--prepare" in message


def test_raw_images_are_not_prepared_to_what_is_no_square(home: Path):
    folder = save_folder(home / "raw", np.zeros((70, 24, 20, 1), np.uint8))
    samples = save_folder(home / "samples", np.zeros((70, 16, 12, 1), np.uint8))
    message = refused(samples, reference=folder, name=None, overrides=[*DIGITS, "evaluate.prepare=adm-crop"])
    assert "samples has images of 12x16 (width x height); a reference is prepared to squares" in message


def test_corrupt_images_of_a_raw_reference_are_named(home: Path, digits: np.ndarray):
    folder = save_folder(home / "raw", np.zeros((70, 24, 20, 1), np.uint8))
    (folder / "0003.png").write_bytes(b"")
    samples = save(home / "a.npz", digits[:80])
    message = refused(samples, reference=folder, overrides=["evaluate.prepare=adm-crop"])
    assert "1 of 70 images cannot be used:\n    0003.png: it is empty\n" in message


# runs and their records


def test_a_run_by_its_own_recipe_leaves_records(home: Path, digits: np.ndarray):
    given = ["sample.steps=7", "evaluate.n_reference=100"]
    run_id, _ = finished(noisy(digits[:80]), "digits-w1a4", *given, seed=3)
    table = scored(run_id, name=None, overrides=given)
    found = records.read()
    assert [r.metric for r in found] == ["fid", "sfid", "is", "precision", "recall"]
    assert [r.value for r in found] == table["Value"].tolist()
    assert [r.n_reference for r in found] == [1797, 1797, None, 100, 100]
    spec = recipe.load("digits-w1a4", given)
    for r in found:
        assert (r.run, r.recipe, r.seed, r.digest) == ("digits-w1a4-s3", spec.id, 3, spec.digest)
        assert (r.features, r.protocol) == ("digits", "adm")
        assert (r.n_images, r.sampling_steps, r.steps, r.device) == (80, 7, spec.train.steps, "cpu")
        assert r.wall_s > 0


def test_a_run_is_named_in_four_ways_and_each_is_recorded(home: Path, digits: np.ndarray):
    run_id, spec = finished(noisy(digits[:80]), "digits-w1a4")
    asked = [
        inputs.evaluation([run_id], None, None, None, None, ()),
        inputs.evaluation([str(runs.run_dir(run_id))], None, None, None, None, ()),
        inputs.evaluation([], None, "digits-w1a4", None, None, ()),
        inputs.of_run(spec, run_id),
    ]
    tables = [evaluate.run(each) for each in asked]
    assert all(table.equals(tables[0]) for table in tables)
    assert [r.metric for r in records.read()] == ["fid", "sfid", "is", "precision", "recall"] * 4
    assert {(r.run, r.recipe) for r in records.read()} == {(run_id, "digits-w1a4")}


def test_what_is_not_a_run_by_its_own_recipe_leaves_no_record(home: Path, digits: np.ndarray):
    run_id, spec = finished(noisy(digits[:80]), "digits-w1a4")
    other, _ = finished(noisy(digits[:80], seed=1), "digits-w1a8")
    scored(run_id, reference="digits", name=None)
    scored(run_id, name="digits", overrides=["evaluate.n_reference=50"])
    scored(runs.samples_npz(spec, run_id), name="digits-w1a4")
    scored(run_id, other, name=None)
    assert records.read() == []


def test_a_run_may_be_the_reference(home: Path, digits: np.ndarray):
    run_id, spec = finished(noisy(digits[:200]), "digits-w1a4")
    samples = save(home / "a.npz", noisy(digits[:150], seed=1))
    by_file = scored(samples, reference=runs.samples_npz(spec, run_id), name="digits-w1a4")
    assert scored(samples, reference=run_id, name=None).equals(by_file)


# notes


def test_too_few_images_are_marked(home: Path, digits: np.ndarray, capsys: pytest.CaptureFixture[str]):
    table = scored(save(home / "a.npz", digits[:64]))
    notes = dict(zip(table["Metric"], table["Note"], strict=True))
    assert notes["FID"] == "TOO FEW IMAGES: 64 sample images for 64 feature dimensions; comes out too high"
    assert notes["sFID"] == "TOO FEW IMAGES: 64 sample images for 112 feature dimensions; comes out too high"
    assert notes["Prec."] == notes["Recall"] == ""
    told = capsys.readouterr().err
    assert f"warning: {home / 'a.npz'}, FID: {notes['FID']}\n" in told
    table = scored(save(home / "a.npz", digits[:113]))
    assert table["Note"].tolist()[:2] == ["", ""]
    assert "warning" not in capsys.readouterr().err


def test_too_few_images_of_the_reference_are_marked(home: Path, digits: np.ndarray):
    table = scored(save(home / "a.npz", digits[:200]), reference=save(home / "b.npz", digits[:65]))
    notes = dict(zip(table["Metric"], table["Note"], strict=True))
    assert notes["FID"] == ""
    assert notes["sFID"] == "TOO FEW IMAGES: 65 reference images for 112 feature dimensions; comes out too high"
    both = scored(home / "b.npz", reference=home / "b.npz")["Note"].tolist()[1]
    assert "65 sample images for 112 feature dimensions, 65 reference images for 112" in both


def test_an_inception_score_of_less_than_a_block_says_so(home: Path):
    def note(n: int, protocol: str = "adm") -> str:
        images = np.random.default_rng(0).integers(0, 256, (n, 16, 16, 1), dtype=np.uint8)
        table = scored(
            save(home / f"{n}.npz", images),
            name=None,
            overrides=[*DIGITS, "evaluate.metrics=['is']", f"evaluate.protocol={protocol}"],
        )
        return table["Note"].item()

    assert note(200) == "rests on 200 images, fewer than a block of 5000"
    assert note(5000) == ""
    assert note(5100) == "its last block has 100 images, fewer than a block of 5000"


def test_images_sorted_by_class_are_marked(home: Path, digits: np.ndarray, capsys: pytest.CaptureFixture[str]):
    labels = np.repeat(np.arange(10), 12)
    chosen = noisy(digits[:120])

    def note(name: str, labels: np.ndarray) -> str:
        table = scored(save(home / name, chosen, arr_1=labels))
        return dict(zip(table["Metric"], table["Note"], strict=True))["IS"]

    assert note("sorted.npz", labels).startswith("SORTED BY CLASS: 12 of one class follow each other; too low, shuffle")
    assert "sorted.npz, IS: SORTED BY CLASS" in capsys.readouterr().err
    shuffled = np.random.default_rng(0).permutation(labels)
    assert note("shuffled.npz", shuffled) == "rests on 120 images, fewer than a block of 5000"
    assert "SORTED" not in capsys.readouterr().err
    for other in (labels[:50], labels / 2, np.stack([labels, labels])):  # no labels
        assert "SORTED" not in note("other.npz", other)


def test_notes_of_a_folder_are_told(home: Path, digits: np.ndarray, capsys: pytest.CaptureFixture[str]):
    folder = save_folder(home / "a", digits[:80])
    Image.fromarray(digits[0, ..., 0]).convert("LA").save(folder / "0000.png")
    scored(folder)
    assert f"note: {folder}: 1 of 80 images are with alpha: alpha dropped\n" in capsys.readouterr().err


# the cache


def test_what_was_seen_is_not_computed_again(home: Path, digits: np.ndarray):
    path = save(home / "a.npz", noisy(digits[:100]))
    first = scored(path)
    known = passes()
    assert len(list(features_dir().iterdir())) == 2  # the samples, the reference
    assert scored(path).equals(first)
    assert scored(path, overrides=["evaluate.n_reference=50", "evaluate.metrics=['kid']"]) is not None
    assert scored(path, reference="digits", name=None).equals(first)
    assert scored(path, reference=path, name=None, overrides=DIGITS) is not None
    assert passes() == known


def test_the_cache_goes_by_content(home: Path, digits: np.ndarray):
    chosen = noisy(digits[:100])
    first = scored(save(home / "a.npz", chosen))
    known = passes()
    np.savez_compressed(home / "b.npz", other=np.arange(3), arr_0=chosen)
    assert scored(home / "b.npz").equals(first)
    assert passes() == known
    changed = chosen.copy()
    changed[50, 8, 8, 0] ^= 255
    assert not scored(save(home / "a.npz", changed)).equals(first)
    assert len(list(features_dir().iterdir())) == 3


def test_the_cache_may_be_deleted(home: Path, digits: np.ndarray):
    path = save(home / "a.npz", noisy(digits[:100]))
    first = scored(path)
    for file in features_dir().glob("*/*"):
        file.unlink()
    assert scored(path).equals(first)


# side by side


def test_sets_are_scored_together_as_alone(home: Path, digits: np.ndarray):
    paths = [save(home / f"{by}.npz", noisy(digits[::3], by=by)) for by in (20, 60)]
    table = scored(*paths)
    assert table["Samples"].tolist() == [str(path) for path in paths for _ in TITLES]
    for path in paths:
        alone = scored(path)
        here = table[table["Samples"] == str(path)].drop(columns="Samples").reset_index(drop=True)
        assert here.equals(alone)


def test_the_intervals_hold_the_values(home: Path, digits: np.ndarray):
    paths = [save(home / f"{by}.npz", noisy(digits[::2], by=by)) for by in (20, 60)]
    metrics = "evaluate.metrics=['fid', 'sfid', 'is', 'precision', 'recall', 'kid']"
    table = scored(*paths, overrides=[metrics], resamples=20)
    assert list(table)[:5] == ["Samples", "Metric", "Value", "Low", "High"]
    plain = scored(*paths, overrides=[metrics])
    assert table["Value"].tolist() == plain["Value"].tolist()
    for _, row in table.iterrows():
        if row["Metric"] == "KID":
            assert (row["Low"], row["High"]) == (None, None)
        else:
            assert row["Low"] <= row["Value"] <= row["High"], row["Metric"]
            assert row["Low"] < row["High"] or row["Value"] in (0, 100), row["Metric"]
    again = scored(*paths, overrides=[metrics], resamples=20)
    assert table.equals(again)
    few, many = table[table["Metric"] == "FID"].to_dict("records")
    assert few["High"] < many["Low"]  # so far apart that they are told apart


def test_stored_statistics_of_samples_have_no_interval(home: Path, digits: np.ndarray):
    stored = {"mu": np.zeros(64), "sigma": np.eye(64), "mu_s": np.zeros(112), "sigma_s": np.eye(112)}
    table = scored(save(home / "a.npz", noisy(digits[:200]), **stored), resamples=10)
    spread = {row["Metric"]: (row["Low"], row["High"]) for _, row in table.iterrows()}
    assert spread["FID"] == spread["sFID"] == (None, None)
    assert spread["IS"][0] < spread["IS"][1]


def test_side_by_side(home: Path, digits: np.ndarray):
    paths = [save(home / f"{n}.npz", noisy(digits[:n])) for n in (60, 200)]
    table = scored(*paths, overrides=["evaluate.metrics=['fid', 'precision', 'kid']"], resamples=10)
    wide = evaluate.side_by_side(table)
    assert list(wide) == ["Samples", "FID", "Prec.", "KID", "Images", "By", "Note"]
    assert wide["Samples"].tolist() == [str(path) for path in paths]
    assert wide["Images"].tolist() == [60, 200]
    assert wide["By"].tolist() == ["bdm's digits network, ADM"] * 2
    assert [note.partition(":")[0] for note in wide["Note"]] == ["FID", "KID"]
    assert "subsets of 200 images" in wide["Note"][1]
    for path, (_, cells) in zip(paths, wide.iterrows(), strict=True):
        for _, row in table[table["Samples"] == str(path)].iterrows():
            value, *more = cells[row["Metric"]].split(" ", 1)
            assert value == f"{row['Value']:.4g}"
            spread = "" if row["Low"] is None else f"[{row['Low']:.4g}, {row['High']:.4g}]"
            mark = " (!)" if path == paths[0] and row["Metric"] == "FID" else ""
            assert (more or [""])[0] == (spread + mark).strip()


def test_one_set_twice(home: Path, digits: np.ndarray):
    path = save(home / "a.npz", noisy(digits[:200]))
    wide = evaluate.side_by_side(scored(path, path, overrides=["evaluate.metrics=['fid']"], resamples=10))
    assert wide["FID"][0] == wide["FID"][1]


def test_runs_whose_recipes_score_differently_are_refused(home: Path, digits: np.ndarray):
    first, _ = finished(noisy(digits[:80]), "digits-w1a4")
    second, _ = finished(noisy(digits[:80], seed=1), "digits-w1a8", "evaluate.n_reference=100")
    message = refused(first, second, name=None)
    assert f"the recipes of {first} and {second} score images differently: evaluate.n_reference.\n" in message
    assert scored(first, second)["Samples"].tolist() == [first] * 5 + [second] * 5


# refusals, before any feature is computed


def refused(*samples: object, **more: object) -> str:
    before = passes()
    with pytest.raises(BdmError) as error:
        scored(*samples, **more)
    assert passes() == before
    assert records.read() == []
    return str(error.value)


def test_images_unlike_the_reference(home: Path, digits: np.ndarray):
    message = refused(save(home / "a.npz", digits[:50, ::2, ::2]), reference=save(home / "b.npz", digits[:50]))
    assert "the features 'digits' are for images [16, 16, 1]" in message
    assert "a.npz has [8, 8, 1]" in message
    message = refused(save(home / "a.npz", digits[:50]), reference=save(home / "b.npz", digits[:50, :8]))
    assert (
        f"{home / 'a.npz'} has images [16, 16, 1] (height, width, channels), {home / 'b.npz'} has [8, 16, 1].\n"
        in message
    )


def test_several_sets_of_several_sizes(home: Path, digits: np.ndarray):
    message = refused(save(home / "a.npz", digits[:50]), save(home / "b.npz", digits[:50, :8]))
    assert "b.npz has" in message


def test_coloured_images_for_the_features_of_grey_ones(home: Path, digits: np.ndarray):
    colour = save(home / "a.npz", digits[:50].repeat(3, axis=3))
    for samples, reference in ((colour, None), ("digits", colour)):
        message = refused(samples, reference=reference)
        assert f"the features 'digits' are for images [16, 16, 1], {colour} has [16, 16, 3]" in message
        assert "choose other features: digits, cifar10, inception" in message


def test_a_handful_of_images(home: Path, digits: np.ndarray):
    message = refused(save(home / "a.npz", digits[:3]))
    assert f"{home / 'a.npz'} has 3 images, at least 4 are needed" in message
    message = refused("digits", reference=home / "a.npz")
    assert "has 3 images, at least 4 are needed" in message
    assert scored(save(home / "a.npz", digits[:4]))["Images"].tolist() == [4] * 5


def test_more_reference_images_than_there_are(home: Path, digits: np.ndarray):
    message = refused(save(home / "a.npz", digits[:50]), overrides=["evaluate.n_reference=2000"])
    assert "2000 reference images are asked for, and there are 1797" in message


def test_more_reference_images_than_there_are_is_told(home: Path, digits: np.ndarray):
    with pytest.raises(BdmError, match="2000 reference images are asked for, and there are 1797"):
        scored(save(home / "a.npz", digits[:50]), overrides=["evaluate.n_reference=2000"])


def test_stored_statistics_of_other_features(home: Path, digits: np.ndarray):
    stored = {"mu": np.zeros(5), "sigma": np.eye(5), "mu_s": np.zeros(3), "sigma_s": np.eye(3)}
    reference = save(home / "reference.npz", digits[:100], **stored)
    with pytest.raises(BdmError, match=r"reference\.npz: the statistic mu has 5 dimensions, the pool features have 64"):
        scored(save(home / "a.npz", digits[:50]), reference=reference)


def test_no_reference(home: Path, digits: np.ndarray):
    path = save(home / "a.npz", digits[:50])
    message = refused(path, name=None, overrides=DIGITS)
    assert "there is no reference to compare with, for fid, sfid, precision, recall.\n" in message
    assert "give --reference" in message
    assert "or --metrics is" in message


def test_missing_files(home: Path, digits: np.ndarray):
    path = save(home / "a.npz", digits[:50])
    assert "nowhere.npz" in refused(home / "nowhere.npz")
    assert "nowhere" in refused(path, reference=home / "nowhere")
    message = refused(path, overrides=["evaluate.reference=nowhere.npz"])
    assert f"evaluate.reference: there is nothing at {home / 'nowhere.npz'}" in message


def test_damaged_samples(home: Path, digits: np.ndarray):
    whole = save(home / "a.npz", digits[:50]).read_bytes()
    (home / "a.npz").write_bytes(whole[:5000] + b"\xff\x00" * 8 + whole[5016:])
    with pytest.raises(BdmError, match=r"cannot read .*a\.npz as an npz file"):
        scored(home / "a.npz")
    assert not list(features_dir().glob("*/*.npy"))


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("evaluate.metrics=['fit']", "unknown metric 'fit'. Did you mean 'fid'?"),
        ("evaluate.protocol=cleen", "evaluate.protocol: input should be 'adm', 'clean' or 'torch-fidelity'"),
        ("evaluate.features=digit", "evaluate.features: input should be 'digits', 'cifar10' or 'inception'"),
        ("evaluate.protocol=clean", "the protocol 'clean' has no sfid, is, precision, recall"),
        ("evaluate.protocol=torch-fidelity", "the protocol 'torch-fidelity' has no sfid.\n"),
    ],
)
def test_unknown_names(home: Path, digits: np.ndarray, override: str, told: str):
    assert told in refused(save(home / "a.npz", digits[:50]), overrides=[override])


@pytest.mark.parametrize("protocol", ["clean", "torch-fidelity"])
def test_protocols_that_are_defined_on_inception_alone(home: Path, digits: np.ndarray, protocol: str):
    given = [f"evaluate.protocol={protocol}", "evaluate.metrics=['fid']"]
    message = refused(save(home / "a.npz", digits[:50]), overrides=given)
    assert f"the protocol '{protocol}' is defined on Inception's features, not on 'digits'.\n" in message


def test_inception_weights_for_other_features(home: Path, digits: np.ndarray):
    message = refused(save(home / "a.npz", digits[:50]), weights=home / "weights.pth")
    assert "--inception-weights says nothing about the features 'digits'" in message


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No weights anywhere, and no way to download them."""
    for weights in (INCEPTION, CLEAN, VGG):
        monkeypatch.delenv(weights.variable, raising=False)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setattr(urllib.request, "_opener", None)  # which remembers the proxies of before
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.mark.parametrize("protocol", ["adm", "torch-fidelity"])
def test_missing_inception_weights(offline: Path, home: Path, digits: np.ndarray, protocol: str):
    path = save(home / "a.npz", digits[:50].repeat(3, 3))
    given = [f"evaluate.protocol={protocol}", "evaluate.metrics=['fid']"]
    message = refused(path, reference=path, name=None, overrides=given)
    file = "weights-inception-2015-12-05-6726825d.pth"
    assert f"the weights of Inception-v3 are not at {offline / file}, and cannot be downloaded (" in message
    assert f"file: {file}\n" in message
    assert f"get it: https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{file}\n" in message
    assert f"put it at {offline / file}, or name it: --inception-weights FILE or $BDM_INCEPTION\n" in message
    assert "--features digits or cifar10" in message
    assert not features_dir().exists()
    assert not (offline / file).exists()


def test_missing_weights_of_clean_fid(offline: Path, home: Path, digits: np.ndarray):
    path = save(home / "a.npz", digits[:50])
    given = ["evaluate.protocol=clean", "evaluate.metrics=['fid']"]
    message = refused(path, reference=path, name=None, overrides=given)
    assert "the weights of clean-fid's Inception-v3 are not at" in message
    assert "inception-2015-12-05.pt" in message
    assert "$BDM_CLEAN_INCEPTION" in message


@pytest.mark.parametrize("named_by", ["option", "variable"])
def test_inception_weights_that_are_other_files(
    offline: Path, home: Path, digits: np.ndarray, named_by: str, monkeypatch: pytest.MonkeyPatch
):
    path, weights = save(home / "a.npz", digits[:50]), home / "weights.pth"

    def message() -> str:
        if named_by == "variable":
            monkeypatch.setenv("BDM_INCEPTION", str(weights))
        return refused(path, reference=path, name=None, weights=weights if named_by == "option" else None)

    assert f"the weights of Inception-v3 are not at {weights}.\n" in message()
    weights.write_bytes(b"not the weights")
    assert f"{weights} has SHA-256 " in message()
    assert "not 6726825d...: another or a cut-off file" in message()


# kills, and several processes


def finish(process: subprocess.Popen) -> tuple[str, str]:
    """What was printed, and what was said beside it."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err


TWO = ["torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m"]
"""On CPUs it is torchrun that starts two processes; `accelerate launch --cpu --num_processes 2` starts one."""


def start(
    *arguments: object, launcher: Sequence[str] = (), stderr: int | IO[str] = subprocess.PIPE
) -> subprocess.Popen:
    """`bdm evaluate` in a process of its own, or in two."""
    alone = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", *launcher, "bdm_cli", "evaluate", *map(str, arguments)]
    return subprocess.Popen(command, env=os.environ | alone, stdout=subprocess.PIPE, stderr=stderr, text=True)


@pytest.fixture
def many(home: Path) -> Path:
    """20,000 images: eight shards, some seconds."""
    images = np.random.default_rng(0).integers(0, 256, (20_000, 16, 16, 1), dtype=np.uint8)
    return save(home / "many.npz", images)


def shards() -> list[Path]:
    return sorted(features_dir().glob("*/shard-*.safetensors"))


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, "it takes too long"
        time.sleep(0.005)


def test_a_killed_evaluation_goes_on_from_whole_shards(
    many: Path, digits: np.ndarray, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What was done is marked (in features that FID does not look at), and is found again in the end."""
    given = (many, "--recipe", "digits", "--metrics", "fid,sfid", "--format", "json")
    killed = start(*given)
    wait_for(lambda: len(shards()) >= 2, killed)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert killed.returncode == -signal.SIGKILL
    killed.communicate()
    left = shards()
    assert 2 <= len(left) < 20_000 / SHARD
    tensors, header = tensorfile.read(left[1])
    tensorfile.write(left[1], tensors | {"logits": torch.full_like(tensors["logits"], 7)}, header)
    table, _ = finish(start(*given))
    assert shards() == []
    logits = np.load(left[0].parent / "logits.npy")
    assert len(logits) == 20_000
    marked = (logits == 7).all(1)
    assert marked[SHARD : 2 * SHARD].all()
    assert marked.sum() == SHARD
    monkeypatch.setenv("BDM_HOME", str(tmp_path / "undisturbed"))
    undisturbed, _ = finish(start(*given))
    assert table == undisturbed


def test_a_cut_off_shard_is_never_taken_for_a_whole_one(home: Path, digits: np.ndarray):
    """Only whole files get the name of a shard; what a kill left of one is under another name."""
    path = save(home / "a.npz", noisy(digits[:100]))
    first = scored(path)
    for folder in features_dir().iterdir():
        for file in folder.iterdir():
            file.unlink()
        (folder / ".shard-00000000-00000100.999.safetensors").write_bytes(b"half of it")
    assert scored(path).equals(first)


def test_two_commands_on_the_same_images_both_succeed(many: Path, tmp_path: Path):
    """One waits for the other (which is held up here, so that it is sure to), and does not compute anything again.

    Which of the two comes first to the next set, the reference, is left open: the other waits for it there.
    """
    given = (many, "--recipe", "digits", "--metrics", "fid", "--format", "json")
    first = start(*given)
    wait_for(lambda: len(shards()) >= 1, first)
    first.send_signal(signal.SIGSTOP)
    try:
        with open(tmp_path / "told", "w") as told:
            second = start(*given, stderr=told)
        wait_for(lambda: "waiting for it" in (tmp_path / "told").read_text(), second)
        waiting = passes()
    finally:
        first.send_signal(signal.SIGCONT)
    one, err = finish(first)
    other, _ = finish(second)
    assert other == one
    said = f"another process works on {shards_dir(waiting)}; waiting for it\n"
    assert said not in err
    assert said in (tmp_path / "told").read_text()
    assert len(list(features_dir().glob("*/summary.safetensors"))) == 2


def shards_dir(files: dict[str, int]) -> Path:
    """The folder of the set that is under way."""
    return features_dir() / next(name for name in files if "shard-" in name).split("/")[0]


needs_gloo = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo for two processes on CPU")


@needs_gloo
def test_two_processes_print_the_table_of_one(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Three shards for two processes, the last one not full."""
    images = np.random.default_rng(0).integers(0, 256, (2 * SHARD + 700, 16, 16, 1), dtype=np.uint8)
    given = (save(home / "a.npz", images), "--recipe", "digits", "--metrics", "fid,sfid,is,kid", "--format", "json")
    expected, _ = finish(start(*given))
    monkeypatch.setenv("BDM_HOME", str(tmp_path / "two"))
    table, _ = finish(start(*given, launcher=TWO))
    assert [row["Metric"] for row in json.loads(table)] == ["FID", "sFID", "IS", "KID"]  # once, or it were no JSON
    assert table == expected
    assert len(list(features_dir().glob("*/summary.safetensors"))) == 2
    assert shards() == []


@needs_gloo
def test_two_processes_record_a_run_once(home: Path, digits: np.ndarray):
    run_id, _ = finished(noisy(digits[:200]), "digits-w1a4")
    finish(start(run_id, launcher=TWO))
    found = records.read()
    assert [r.metric for r in found] == ["fid", "sfid", "is", "precision", "recall"]
    for r, value in zip(found, scored(run_id, name=None)["Value"], strict=True):
        assert r.value == pytest.approx(value, rel=1e-4)


@needs_gloo
def test_two_processes_compare(home: Path, digits: np.ndarray):
    paths = [save(home / f"{n}.npz", noisy(digits[:n])) for n in (60, 200)]
    given = ("--compare", "--resamples", "10", "--recipe", "digits", *paths)
    out, _ = finish(start(*given, launcher=TWO))
    assert out.count("Samples") == 1


# what is noted


def test_the_statistics_of_a_file_serve_adm_alone(home: Path, digits: np.ndarray):
    stored = {"mu": np.zeros(5), "sigma": np.eye(5), "mu_s": np.zeros(3), "sigma_s": np.eye(3)}
    images = sets.load(save(home / "a.npz", digits[:50], **stored))
    assert evaluate._without_stored(images, protocols.ADM) is images
    for protocol in (protocols.CLEAN, protocols.TORCH_FIDELITY):
        found = evaluate._without_stored(images, protocol)
        assert found.stored == {}
        assert f"its mu and sigma are ADM's; '{protocol.name}' takes its 50 images" in found.notes[-1]


def test_a_recipe_in_the_place_of_its_run_is_noted(home: Path, capsys: pytest.CaptureFixture[str]):
    table = scored("digits-w1a4", reference="digits", overrides=["evaluate.metrics=['fid']"])
    assert table["Value"][0] == pytest.approx(0, abs=1e-6)
    told = capsys.readouterr().err
    assert "note: digits-w1a4 is a recipe: its training images are scored; a run of it is digits-w1a4-s0\n" in told
    assert "note: samples and reference are the same images\n" in told


def test_copies_do_not_count_as_images(home: Path, digits: np.ndarray):
    path = save(home / "a.npz", np.repeat(noisy(digits[:50]), 4, axis=0))
    table = scored(path, overrides=["evaluate.metrics=['fid', 'kid']"])
    assert (
        table["Note"][0] == "TOO FEW IMAGES: 50 different sample images for 64 feature dimensions; comes out too high"
    )
    assert table["Note"][1] == "torch-fidelity's definition, ADM has none; subsets of 200 images"


def test_images_that_lie_sorted_by_class_are_told(home: Path, digits: np.ndarray):
    labels = np.repeat(np.arange(10), 20)
    mixed = np.random.default_rng(0).permutation(labels)
    for order, told in ((labels, True), (mixed, False)):
        path = save(home / f"{told}.npz", noisy(digits[:200]), arr_1=order)
        table = scored(path, overrides=["evaluate.metrics=['is']"])
        assert ("SORTED BY CLASS: 20 of one class follow each other" in table["Note"][0]) == told


def test_rounded_distances_are_told(home: Path, digits: np.ndarray):
    path = save(home / "a.npz", noisy(digits[:100]))
    chosen = ["evaluate.metrics=['precision']", "evaluate.distances=float16"]
    assert scored(path, overrides=chosen)["Protocol"][0] == "ADM, float16 distances"
    assert scored(path, overrides=chosen[:1])["Protocol"][0] == "ADM"
