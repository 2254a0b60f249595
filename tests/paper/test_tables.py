"""The join of records and cells: which numbers land where, as what text, and which never do."""

import math
import shutil

import pytest

from bdm_cli import recipe, records
from bdm_cli.errors import BdmError
from bdm_cli.paper import tables

MEASURED = {"digest": "v1", "n_images": 50_000, "steps": 10**9, "wall_s": 1.0, "device": "cpu"}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("BDM_HOME", str(tmp_path))


def measure(name, metric, value, seed=0, **changed):
    run = f"{name}-s{seed}"
    return records.make(run=run, recipe=name, seed=seed, metric=metric, value=value, **(MEASURED | changed))


def cell(frame, column, **labels):
    for label, wanted in labels.items():
        frame = frame[frame[label] == wanted]
    assert len(frame) == 1
    return frame.iloc[0][column]


def line(frame, table, row, column):
    found = frame[(frame["table"] == table) & (frame["row"] == row) & (frame["column"] == column)]
    assert len(found) == 1
    return found.iloc[0]


def missing(value):
    return value is None or value != value


def test_every_table_mirrors_the_paper_without_records():
    specs = tables.specs()
    assert len(specs) == 21
    printed = tables.cells().groupby("table")["value"].count()
    for id, spec in specs.items():
        frame = tables.table(id, [])
        assert list(frame.columns) == [*spec.labels, *(f"{column.name} paper" for column in spec.columns)]
        assert frame.drop(columns=list(spec.labels)).notna().sum().sum() == printed[id]


def test_the_papers_numbers_stand_as_printed():
    frame = tables.table("1", [])
    assert frame.iloc[0].to_dict() == {
        "Method": "FP",
        "#Bits": "32/32",
        "IS paper": "8.90",
        "FID paper": "5.54",
        "sFID paper": "4.64",
        "Prec. paper": "67.92",
    }


def test_cells_the_paper_leaves_out_are_missing():
    frame = tables.table("2", [])
    value = cell(frame, "sFID paper", Dataset="LSUN-Bedrooms 256x256", Method="EfficientDM", **{"#Bits": "4/4"})
    assert missing(value)


def test_ours_and_digits_stand_in_their_own_columns():
    frame = tables.table("7", [measure("bedrooms-w1a4", "fid", 8.0), measure("digits-w1a4-ebb", "fid", 44.0)])
    fid = [name for name in frame.columns if name.startswith("FID")]
    assert fid == ["FID paper", "FID ours", "FID digits"]
    assert cell(frame, "FID ours", Method="+LRM") == "8.00 (1)"
    assert cell(frame, "FID digits", Method="+EBB") == "44.00 (1)"
    assert all(missing(value) for value in frame["FID ours"][:3])
    assert missing(cell(frame, "FID digits", Method="+LRM"))
    assert not [name for name in frame.columns if name.startswith("Recall") and name != "Recall paper"]


@pytest.mark.parametrize(("name", "present"), [("digits-w1a4", "digits"), ("bedrooms-w1a4", "ours")])
def test_a_scale_never_fills_the_other_scales_columns(name, present):
    found = [measure(name, metric, 1.0) for metric in ("fid", "sfid", "is", "precision", "recall")]
    absent = {"digits": "ours", "ours": "digits"}[present]
    for id in tables.specs():
        assert not [name for name in tables.table(id, found).columns if name.endswith(f" {absent}")]
    long = tables.long(found)
    assert long["twin_n" if present == "ours" else "ours_n"].sum() == 0
    assert long["ours_n" if present == "ours" else "twin_n"].sum() > 0


def test_one_digits_run_is_the_twin_of_every_data_set():
    frame = tables.table("2", [measure("digits-ldm-w1a4", "fid", 33.25)])
    filled = frame[frame["FID digits"] == "33.25 (1)"]
    assert list(filled["Dataset"]) == ["LSUN-Bedrooms 256x256", "LSUN-Churches 256x256", "FFHQ 256x256"]


def test_mean_and_sample_standard_deviation_over_seeds():
    found = [measure("digits-w1a4", "fid", value, seed) for seed, value in enumerate((10.0, 12.0, 17.0))]
    # mean 13, deviations -3, -1, 4: sqrt((9 + 1 + 16) / 2)
    assert cell(tables.table("7", found), "FID digits", Method="+LRM") == "13.00 ± 3.61 (3)"
    number = line(tables.long(found), "7", "+LRM | 1/4", "FID")
    assert number["paper"] == 7.74
    assert number["twin_mean"] == pytest.approx(13.0)
    assert number["twin_std"] == pytest.approx(math.sqrt(13))
    assert number["twin_n"] == 3
    assert number["ours_n"] == 0
    assert math.isnan(number["ours_mean"])
    assert math.isnan(number["ours_std"])
    assert not number["marked"]


def test_one_seed_has_no_spread():
    number = line(tables.long([measure("digits-w1a4", "fid", 10.0)]), "7", "+LRM | 1/4", "FID")
    assert (number["twin_mean"], number["twin_n"]) == (10.0, 1)
    assert math.isnan(number["twin_std"])


def test_the_newest_record_of_a_seed_counts():
    found = [measure("digits-w1a4", "fid", 99.0), measure("digits-w1a4", "fid", 10.0)]
    assert cell(tables.table("7", found), "FID digits", Method="+LRM") == "10.00 (1)"


def test_seeds_of_an_older_recipe_do_not_enter_the_mean():
    old = measure("digits-w1a4", "fid", 99.0, seed=1, digest="v0").model_copy(
        update={"time": "2024-01-01T00:00:00+00:00"}
    )
    found = [old, measure("digits-w1a4", "fid", 10.0), measure("digits-w1a4", "fid", 12.0, seed=2)]
    assert cell(tables.table("7", found), "FID digits", Method="+LRM") == "11.00 ± 1.41 (2)"


def test_loss_metrics_join_like_any_other():
    found = [measure("bedrooms-w1a32-ebb", "loss_simple@100", 0.25, n_images=None, steps=100)]
    frame = tables.table("8", found)
    assert cell(frame, "1e2 ours", Method="+EBB") == "0.250 (1)"
    assert "1e1 ours" not in frame.columns


@pytest.mark.parametrize(
    ("metric", "changed", "marked"),
    [
        ("fid", {}, False),
        ("fid", {"n_images": 49_999}, True),
        ("fid", {"n_images": None}, True),
        ("size_mb", {"n_images": None, "steps": 0}, False),
    ],
)
def test_dagger_for_few_images(metric, changed, marked):
    long = tables.long([measure("ffhq-w1a4", metric, 9.0, **changed)])
    assert set(long[long["ours_n"] > 0]["marked"]) == {marked}


@pytest.mark.parametrize(("steps", "marked"), [(399, True), (400, False)])
def test_dagger_for_few_steps(tmp_path, monkeypatch, steps, marked):
    """A recipe of the paper's name whose file asks for 400 steps."""
    (tmp_path / "recipes").mkdir()
    for name in ("digits", "digits-w1a4"):
        shutil.copy(recipe.names()[name], tmp_path / "recipes")
    child = 'extends = "digits-w1a4"\ntrain = { steps = 400 }\n'
    (tmp_path / "recipes" / "bedrooms-w1a4.toml").write_text(child)
    monkeypatch.setattr(recipe, "roots", lambda: [tmp_path / "recipes"])
    frame = tables.table("7", [measure("bedrooms-w1a4", "fid", 8.0, steps=steps)])
    assert cell(frame, "FID ours", Method="+LRM") == "8.00 (1)" + "†" * marked


@pytest.mark.parametrize(("steps", "marked"), [(999, True), (1000, False)])
def test_dagger_of_a_loss_asks_for_its_own_step(steps, marked):
    found = [measure("bedrooms-w1a32", "loss_simple@1000", 0.2, n_images=None, steps=steps)]
    assert cell(tables.table("13", found), "1e3 ours", Method="L_LRM") == "0.200 (1)" + "†" * marked


def test_one_weak_seed_marks_the_mean():
    found = [measure("ffhq-w1a4", "fid", 10.0), measure("ffhq-w1a4", "fid", 12.0, seed=1, n_images=5000)]
    value = cell(tables.table("2", found), "FID ours", Dataset="FFHQ 256x256", Method="BinaryDM", **{"#Bits": "1/4"})
    assert value == "11.00 ± 1.41 (2)†"


def test_the_miniature_is_never_marked():
    long = tables.long([measure("digits-w1a4", "fid", 9.0, n_images=100, steps=1)])
    assert not long["marked"].any()


def test_overrides_join_exactly():
    frame = tables.table("14", [measure("digits-w1a32+method.lrm_k=8", "fid", 24.0)])
    assert cell(frame, "FID digits", K="8") == "24.00 (1)"
    assert frame["FID digits"].notna().sum() == 1


def test_what_was_counted_stands_in_ours_until_it_is_measured():
    counts = {("bedrooms-w1a4", "size_mb"): 34.398, ("bedrooms-w1a4", "ops_g"): 6.0485, ("digits-w1a4", "fid"): 1.0}
    lines = tables.long([], counts)
    frame = tables.layout(tables.specs()["5"], lines)
    assert cell(frame, "Size (MB) ours", Method="BinaryDM") == "34.4‡"
    assert cell(frame, "OPs (1e9) ours", Method="BinaryDM") == "6.0‡"
    assert missing(cell(frame, "Size (MB) ours", Method="LSQ"))
    assert not [name for name in frame.columns if name.endswith(" digits")]
    number = line(lines, "5", "LDM-4 | BinaryDM | 1/4", "OPs (1e9)")
    assert (number["ours_mean"], number["ours_n"], number["counted"], number["marked"]) == (6.0485, 0, True, False)
    assert set(lines[lines["counted"]]["table"]) == {"2", "5", "6", "16"}
    measured = [measure("bedrooms-w1a4", "size_mb", 35.0, n_images=None, steps=0)]
    frame = tables.layout(tables.specs()["5"], tables.long(measured, counts))
    assert cell(frame, "Size (MB) ours", Method="BinaryDM") == "35.0 (1)"


def test_notes_on_accounting_are_notes_too():
    found = tables.specs()
    assert {id for id, spec in found.items() if spec.accounting} == {"2", "5", "16", "B4"}
    for spec in found.values():
        assert set(spec.accounting) <= set(spec.notes)


def test_other_holds_what_no_table_has_a_place_for():
    found = [
        measure("digits-w1a4", "fid", 33.0),
        measure("digits-w1a4", "size_mb", 0.3125),
        measure("digits-w1a4-mine", "fid", 40.0),
        measure("digits-w1a4-mine", "fid", 42.0, seed=1),
    ]
    frame = tables.other(found)
    assert list(frame["recipe"]) == ["digits-w1a4", "digits-w1a4-mine"]
    assert cell(frame, "size_mb", recipe="digits-w1a4") == "0.3125 (1)"
    assert cell(frame, "fid", recipe="digits-w1a4-mine") == "41.00 ± 1.41 (2)"
    assert missing(cell(frame, "fid", recipe="digits-w1a4"))
    assert tables.other(found[:1]).empty


def test_other_marks_the_papers_scale_too():
    assert cell(tables.other([measure("ffhq-w1a4-mine", "fid", 9.0, n_images=10)]), "fid", recipe="ffhq-w1a4-mine") == (
        "9.000 (1)†"
    )


def test_beside_takes_only_this_version_of_a_recipe():
    spec = recipe.load("digits-w1a4")
    other = recipe.load("digits-w1a4", ["method.tau=0.5"])
    found = [
        measure("digits-w1a4", "fid", 30.0, digest=spec.digest),
        measure("digits-w1a4", "fid", 32.0, seed=1, digest=spec.digest),
        measure("digits-w1a4", "sfid", 20.0, digest="older"),
        measure(other.id, "fid", 35.0, digest=other.digest, n_images=100),
    ]
    frame = tables.beside(
        found, ("7", "4"), [tables.Row("BinaryDM", spec, spec.id), tables.Row("tau", other, other.id)]
    )
    assert list(frame.columns) == ["Variant", "FID paper", "FID digits", "sFID paper", "Prec. paper", "Recall paper"]
    assert list(frame["FID digits"]) == ["31.00 ± 1.41 (2)", "35.00 (1)"]
    assert frame["FID paper"][0] == "7.74"
    assert missing(frame["FID paper"][1])


def test_unknown_table():
    with pytest.raises(BdmError, match=r"unknown table '17'\. .*\n  known: 1, 10, 11, .*, B4, BA, BC, P1, P2"):
        tables.table("17", [])
