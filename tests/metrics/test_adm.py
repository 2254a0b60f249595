"""Every formula against values from OpenAI's own evaluator under TensorFlow (adm_values.json)."""

import json
from pathlib import Path

import numpy as np
import pytest
from adm_cases import CASES, digest
from builders import CPU, statistics

from bdm_cli.metrics import adm_float16, inception_score, precision_recall
from bdm_cli.metrics.frechet import FrechetTo

VALUES = json.loads(Path(__file__).with_name("adm_values.json").read_text())["cases"]


def cases(kind: str) -> list[str]:
    return [name for name in CASES if name.startswith(kind)]


@pytest.fixture
def arrays(case):
    """The case's features, once their bits are known to be those that ADM's code was given."""
    found = CASES[case]()
    assert digest(found) == VALUES[case]["sha256"]
    assert all(part.dtype == np.float32 for part in found.values())
    return found


def test_there_is_a_value_for_every_case():
    assert set(VALUES) == set(CASES)
    assert [len(cases(kind)) for kind in ("fid", "is", "pr")] == [9, 3, 6]


@pytest.mark.parametrize("case", cases("fid"))
def test_frechet_distances(case, arrays):
    a, b = statistics(arrays["a"]), statistics(arrays["b"])
    few = a.degenerate or b.degenerate
    assert few == ("rank" in case)
    found, closeness = FrechetTo(b)(a), 1e-6 if few else 3e-7  # ADM's means are float32
    assert found == pytest.approx(VALUES[case]["adm"], rel=closeness)
    if few:
        assert FrechetTo(a)(b) == pytest.approx(VALUES[case]["adm_swapped"], rel=1e-6)


@pytest.mark.parametrize("case", cases("is"))
def test_inception_scores(case, arrays):
    found = inception_score.score(arrays["logits"], inception_score.in_file_order(len(arrays["logits"])))
    assert found == pytest.approx(VALUES[case]["adm"], rel=1e-6)
    assert found == pytest.approx(VALUES[case]["float64"], rel=1e-9)


@pytest.mark.parametrize("case", cases("pr"))
def test_exact_precision_and_recall(case, arrays):
    found = precision_recall.exact(arrays["sample"], arrays["ref"], CPU)
    assert [found.precision / 100, found.recall / 100] == pytest.approx(VALUES[case]["float64"], abs=1e-12)
    assert [found.precision / 100, found.recall / 100] == pytest.approx(VALUES[case]["adm_in_float32"], abs=1e-12)


@pytest.mark.parametrize("case", [case for case in cases("pr") if case != "pr_c"])
def test_precision_and_recall_rounded_to_float16_as_adm_rounds_them(case, arrays):
    found = adm_float16.coverage(arrays["sample"], arrays["ref"], CPU)
    assert [found.precision / 100, found.recall / 100] == pytest.approx(VALUES[case]["adm"], abs=1e-9)


def test_rounding_to_float16_matters():
    """Else the test before this one would pass without it."""
    moved = [case for case in cases("pr") if VALUES[case]["adm"] != VALUES[case]["adm_in_float32"]]
    assert moved == ["pr_a", "pr_b", "pr_d"]


def test_rows_that_are_no_whole_packets_are_refused():
    arrays = CASES["pr_c"]()
    with pytest.raises(ValueError, match="rows of 6 numbers are no whole packets of 8"):
        adm_float16.coverage(arrays["sample"], arrays["ref"], CPU)
