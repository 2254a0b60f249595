"""`bdm evaluate` on the digits: npz, folders, references with statistics, records, the cache, and every refusal."""

import numpy as np
import pytest
from PIL import Image

from bdm_cli import recipe, records, runs
from bdm_cli.diffusion.data import reference_images
from bdm_cli.errors import BdmError
from bdm_cli.jobs import evaluate
from bdm_cli.metrics.features import extract, load_features
from bdm_cli.metrics.summary import summarize


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("BDM_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def digits():
    return reference_images(recipe.load("digits"))[:]


def noisy(images: np.ndarray, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(-40, 41, images.shape)
    return (images.astype(int) + noise).clip(0, 255).astype(np.uint8)


def save(path, images, **more):
    np.savez(path, images, **more)
    return path


def values(table):
    return dict(zip(table["Metric"], table["Value"], strict=True))


def test_real_digits_score_better_than_noisy_ones(home, digits):
    spec = recipe.load("digits")
    halves = save(home / "real.npz", digits[::2]), save(home / "noisy.npz", noisy(digits[::2]))
    real, bad = (values(evaluate.run(spec, path)) for path in halves)
    assert list(real) == ["FID", "sFID", "IS", "Prec.", "Recall"]
    assert real["FID"] < bad["FID"] / 3
    assert real["sFID"] < bad["sFID"] / 3
    assert 8 < real["IS"] <= 10
    assert real["Prec."] == 100  # they are reference images
    assert real["Prec."] > bad["Prec."]
    assert records.read() == []


def test_the_reference_itself_has_distance_zero(home, digits):
    found = values(evaluate.run(recipe.load("digits"), save(home / "all.npz", digits)))
    assert found["FID"] == pytest.approx(0, abs=1e-4)
    assert found["sFID"] == pytest.approx(0, abs=1e-4)
    assert found["Prec."] == found["Recall"] == 100


def test_a_folder_and_an_npz_of_the_same_images_score_the_same(home, digits):
    chosen = noisy(digits[:80])
    (home / "folder").mkdir()
    for i, image in enumerate(chosen):
        Image.fromarray(image[..., 0]).save(home / "folder" / f"{i:03d}.png")
    spec = recipe.load("digits")
    assert evaluate.run(spec, home / "folder").equals(evaluate.run(spec, save(home / "a.npz", chosen)))


def test_a_run_of_ours_is_recorded(home, digits):
    spec = recipe.load("digits-w1a4", ["sample.steps=7", "evaluate.n_reference=100"])
    table = evaluate.run(spec, save(home / "a.npz", noisy(digits[:60])), run_id="digits-w1a4-s3")
    found = records.read()
    assert [r.metric for r in found] == ["fid", "sfid", "is", "precision", "recall"]
    assert [r.value for r in found] == table["Value"].tolist()
    assert [r.n_reference for r in found] == [1797, 1797, None, 100, 100]
    for r in found:
        assert (r.run, r.recipe, r.seed, r.digest) == ("digits-w1a4-s3", spec.id, 3, spec.digest)
        assert (r.features, r.n_images, r.sampling_steps, r.steps) == ("digits", 60, 7, spec.train.steps)
        assert r.wall_s > 0


def test_the_reference_is_cached_by_what_it_depends_on(home, digits):
    path = save(home / "a.npz", noisy(digits[:50]))
    first = evaluate.run(recipe.load("digits"), path)
    (cached,) = runs.cache_dir().glob("reference-*")
    written = cached.stat().st_mtime_ns
    assert evaluate.run(recipe.load("digits"), path).equals(first)
    assert cached.stat().st_mtime_ns == written
    evaluate.run(recipe.load("digits", ["evaluate.n_reference=50"]), path)
    reference = save(home / "other.npz", digits[:200])
    evaluate.run(recipe.load("digits", [f"evaluate.reference={reference}"]), path)
    assert len(list(runs.cache_dir().glob("reference-*"))) == 3


def test_stored_statistics_of_a_reference_serve_fid_and_sfid(home, digits):
    whole = summarize(extract(load_features("digits"), digits))
    stored = {"mu": whole.pool_statistics.mu, "sigma": whole.pool_statistics.sigma}
    stored |= {"mu_s": whole.spatial_statistics.mu, "sigma_s": whole.spatial_statistics.sigma}
    samples = save(home / "a.npz", noisy(digits[:300]))
    reference = save(home / "reference.npz", digits[:100], **stored)
    few = values(evaluate.run(recipe.load("digits", [f"evaluate.reference={reference}"]), samples))
    full = values(evaluate.run(recipe.load("digits"), samples))
    assert few["FID"] == pytest.approx(full["FID"])
    assert few["sFID"] == pytest.approx(full["sFID"])
    assert few["Recall"] != full["Recall"]


def test_few_images_are_scored_with_a_warning(home, digits, capsys):
    evaluate.run(recipe.load("digits"), save(home / "a.npz", digits[:64]))
    assert "64 sample images for 64 feature dimensions: FID comes out too high" in capsys.readouterr().err
    evaluate.run(recipe.load("digits"), save(home / "a.npz", digits[:113]))
    assert "warning" not in capsys.readouterr().err


def refused(path, message, *overrides):
    with pytest.raises(BdmError, match=message):
        evaluate.run(recipe.load("digits", list(overrides)), path)
    assert records.read() == []


def test_images_unlike_the_reference(home, digits):
    refused(
        save(home / "a.npz", digits.repeat(3, axis=3)), r"has images \[16, 16, 3\] .*recipe 'digits' has \[16, 16, 1\]"
    )
    refused(save(home / "a.npz", digits[:, ::2, ::2]), r"has images \[8, 8, 1\] ")


def test_images_unlike_what_the_features_are_for(home, digits):
    color = save(home / "a.npz", digits[:50].repeat(3, axis=3))
    refused(
        color, r"features 'digits' are for images \[16, 16, 1\], .* has \[16, 16, 3\]", f"evaluate.reference={color}"
    )


def test_too_few_images(home, digits):
    refused(save(home / "a.npz", digits[:3]), "has 3 images, at least 4 are needed")
    refused(
        save(home / "a.npz", digits[:50]),
        "2000 reference images are asked for, and there are 1797",
        "evaluate.n_reference=2000",
    )


def test_the_table_keeps_whole_numbers(home, digits):
    table = evaluate.run(recipe.load("digits"), save(home / "a.npz", digits[:50]))
    assert table["Images"].tolist() == [50] * 5
    assert table["Reference images"].tolist() == [1797, 1797, None, 1797, 1797]
    assert evaluate.run(recipe.load("digits", ["evaluate.metrics=[]"]), home / "a.npz").empty


def test_unknown_metric_and_missing_files(home, digits):
    refused(home / "a.npz", r"unknown metric 'fit'\. Did you mean 'fid'", 'evaluate.metrics=["fit"]')
    refused(home / "a.npz", "there are no images at")
    path = save(home / "a.npz", digits[:50])
    refused(path, r"there is nothing at .*nowhere\.npz", "evaluate.reference=nowhere.npz")


def test_missing_inception_weights_are_named_before_anything_is_read(home, monkeypatch):
    monkeypatch.setenv("BDM_INCEPTION", str(home / "nothing.pth"))
    refused(home / "a.npz", r"Inception weights are not at .*nothing\.pth", "evaluate.features=inception")
