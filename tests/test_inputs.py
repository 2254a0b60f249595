"""What a recipe lacks, before anything is started."""

from pathlib import Path

import pytest

from bdm_cli import inputs
from bdm_cli.errors import BdmError
from bdm_cli.recipe import load


def test_everything_that_is_missing_is_told_with_its_place_and_source(home: Path):
    told = inputs.missing(load("churches-w1a4"))
    assert [text.split(":")[0] for text in told] == ["training images", "full-precision teacher", "first stage"]
    assert str(home / "models/ldm/churches") in told[1]
    assert "bdm import model.ckpt --model churches" in told[1]
    with pytest.raises(BdmError, match="'churches-w1a4' lacks 3 inputs"):
        inputs.require(load("churches-w1a4"))


def test_images_are_not_missed_once_they_are_encoded(home: Path):
    cache = home / "data" / "churches-latents"
    cache.mkdir(parents=True)
    (cache / "plan.json").write_text("{}")
    assert len(inputs.missing(load("churches"))) == 3
    (cache / "cache.json").write_text("{}")
    assert [text.split(":")[0] for text in inputs.missing(load("churches"))] == [
        "full-precision teacher",
        "first stage",
    ]


@pytest.mark.parametrize(("name", "more"), [("bedrooms", 1), ("imagenet", 1), ("churches", 0), ("digits", 0)])
def test_the_reference_is_told_only_for_the_evaluation(home: Path, name: str, more: int):
    spec = load(name)
    told = inputs.missing(spec, evaluation=True)
    assert len(told) == len(inputs.missing(spec)) + more
    if more:
        assert "VIRTUAL_" in told[-1]
        (home / spec.evaluate.reference).parent.mkdir(parents=True)
        (home / spec.evaluate.reference).touch()
        assert inputs.missing(spec, evaluation=True) == inputs.missing(spec)


def test_a_hub_id_is_not_missed(home: Path):
    spec = load("bedrooms", ["model.pretrained=owner/name"])
    assert [text.split(":")[0] for text in inputs.missing(spec)] == ["training images", "first stage"]
