"""`bdm methods`: every method of the table beside its paper, its cost and what was run; and one in its own words."""

import json

import pandas as pd
import pytest

from bdm_cli import recipe, records
from bdm_cli.cli import app
from bdm_cli.errors import BdmError
from bdm_cli.jobs import methods as job
from bdm_cli.methods import METHODS, build
from bdm_cli.paper import tables
from bdm_cli.registry import resolve


@pytest.fixture(scope="module")
def listed():
    return job.run()


@pytest.fixture
def quick():
    return job.run(with_cost=False).set_index("Method")


def measure(run, name):
    given = {"seed": 0, "value": 1.0, "digest": "v1", "steps": 1, "wall_s": 1.0, "device": "cpu"}
    for metric in ("fid", "is"):
        records.append(records.make(run=run, recipe=name, metric=metric, **given))


def test_one_row_per_method_in_the_tables_order(listed):
    assert listed["Method"].tolist() == list(METHODS)
    assert listed["Printed as"].tolist() == [entry.label for entry in METHODS.values()]
    assert listed["Paper"].tolist() == [entry.source for entry in METHODS.values()]
    assert (listed["Definition"] != "").all()


def test_where_the_papers_have_it(quick):
    assert tuple(quick.loc["lsq", ["W/A in papers", "Tables"]]) == ("2/32 2/8 2/4", "1, 2, 5")
    assert tuple(quick.loc["bidm", ["W/A in papers", "Tables"]]) == ("1/1", "P1, P2, B4, BA, BC")
    assert tuple(quick.loc["reactnet", ["W/A in papers", "Tables"]]) == ("1/4 1/1", "2, P1, P2")
    assert tuple(quick.loc["lmb", ["W/A in papers", "Tables"]]) == ("", "")
    named = {table for places in quick["Tables"] for table in places.split(", ")} - {""}
    assert named == set(tables.specs())


def test_cost_is_that_of_the_method_s_recipe(listed):
    found = listed.set_index("Method")
    assert tuple(found.loc["fp", ["Size (MiB)", "OPs (G)", "Counted"]]) == (1045.44, 96.018, "bedrooms-fp")
    assert tuple(found.loc["binarydm", ["Size (MiB)", "OPs (G)", "Counted"]]) == (34.4, 6.049, "bedrooms-w1a4")
    assert tuple(found.loc["lsq", ["Size (MiB)", "OPs (G)", "Counted"]]) == (66.93, 12.046, "bedrooms-w2a4-lsq")
    assert tuple(found.loc["bidm", ["Size (MiB)", "OPs (G)", "Counted"]]) == (111.55, 9.368, "bedrooms-w1a1-bidm")
    assert found.loc["reactnet", "Counted"] == "bedrooms-w1a4-reactnet"
    assert found.loc["efficientdm", "Counted"] == "bedrooms-w4a4-efficientdm"
    assert found["Size (MiB)"].notna().all()
    assert (found["Counted"].map(lambda name: recipe.load(name).method["name"]) == found.index).all()


def test_whether_it_packs_and_why_not(listed):
    found = listed.set_index("Method")["Packs"]
    assert found["fp"] == "no: nothing is quantized"
    assert found["qdm"].startswith("no: its queries and keys are normalised")
    assert (found.drop(["fp", "qdm"]) == "yes").all()


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["method.form=original"], "no: its activations are 0 and 1"),
        (["method.activation_bits=1"], "yes"),
    ],
)
def test_why_a_recipe_does_not_pack(overrides, reason):
    assert job._packs(recipe.load("digits-w1a1-dorefa", overrides)).startswith(reason)


def test_without_cost_no_network_is_built(quick):
    assert not {"Size (MiB)", "OPs (G)", "Counted", "Packs"} & set(quick.columns)


def test_recipes_and_runs_are_told(home):
    measure("digits-w1a4-tdq-s0", "digits-w1a4-tdq")
    measure("digits-w1a4-tdq-s1", "digits-w1a4-tdq")
    measure("digits-ldm-w1a4+method.lrm_k=2-s0", "digits-ldm-w1a4+method.lrm_k=2")
    measure("digits-w1a4+method.name=reactnet-s0", "digits-w1a4+method.name=reactnet")
    measure("bedrooms-w1a4-qdm-s0", "bedrooms-w1a4-qdm")
    measure("digits-mine-s0", "digits-mine")
    found = job.run(with_cost=False).set_index("Method")
    runs = found["Digits runs"]
    assert runs[runs > 0].to_dict() == {"tdq": 2, "reactnet": 1, "binarydm": 1}
    assert found["Recipes"].sum() == sum("-fp" in name or "-w" in name for name in recipe.names())
    assert found.loc["fp", "Recipes"] == sum(name.endswith("-fp") for name in recipe.names())


def test_a_recipe_of_ones_own_is_its_methods(tmp_path, monkeypatch):
    (tmp_path / "digits-w1a4-mine.toml").write_text('extends = "digits-w1a4"\nmethod = { name = "tdq" }\n')
    before, roots = len(job._recipes("tdq")), recipe.roots()
    monkeypatch.setattr(recipe, "roots", lambda: [*roots, tmp_path])
    assert len(job._recipes("tdq")) == before + 1
    assert job._recipes("binarydm")[0].method["name"] == "binarydm"


# ---- one method ------------------------------------------------------------------------------------------------------


def test_a_method_in_its_own_words():
    table = job.one("binarydm").set_index("Key")
    assert table.loc["name", "Meaning"].startswith("EBB and LRM: L = L_simple + L_EBB")
    assert table.loc["printed as", "Value"] == "BinaryDM"
    assert table.loc["paper", "Value"] == "ICLR 2025, arXiv:2404.05662"
    assert tuple(table.loc["method.lrm_k"]) == (
        "4",
        "float >= 1",
        "K, the reduction of a block's channels c to round(c / K) components.",
    )
    assert tuple(table.loc["method.penalty", ["Value", "Allowed"]]) == ("signed", "signed, absolute")
    assert tuple(table.loc["method.ebb_center", ["Value", "Allowed"]]) == ("false", "true, false")
    assert table.loc["method.tau", "Meaning"] == "weight of L_EBB (Eq. 9)."  # told by the class it extends
    assert table.loc["method.edge_bits", "Meaning"].startswith("weights and inputs of the layers next to input and out")
    assert "bedrooms-w1a4" in table.loc["recipes", "Value"].split(", ")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_explains_itself(name):
    table = job.one(name).set_index("Key")
    kind = resolve("method", name, METHODS)
    fields = [f"method.{field}" for field in kind.__pydantic_fields__]
    assert [key for key in table.index if key.startswith("method.")] == fields
    assert table.loc["name", "Meaning"]
    told = table.loc[fields]
    assert (told["Value"] != "").all()
    assert (told["Allowed"] != "").all()
    spec = recipe.load(table.loc["recipes", "Value"].split(", ")[0])
    assert {f"method.{key}" for key in spec.method} - {"method.name"} <= set(fields)
    assert build(spec)
    assert (told["Meaning"] == "").sum() <= 1, "each field is explained in the docstring, alone or with another"


def test_notes_stand_behind_the_fields():
    """XNOR-Net's deviations are a paragraph of its docstring behind the fields."""
    table = job.one("xnor").set_index("Key")
    assert "Deviations: " in table.loc["notes", "Meaning"]
    assert "Deviations: " not in table.loc["name", "Meaning"] + table.loc["method.bias", "Meaning"]
    assert "'sample'" in table.loc["method.scale", "Meaning"]


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["table", "json", "csv", "md", "latex"])
def test_forms(form, capsys):
    app(["methods", "--no-cost", "--format", form], standalone_mode=False)
    out, err = capsys.readouterr()
    assert err == ""
    assert "INSTA-BNN" in out
    assert "nan" not in out.lower().replace("finance", "")
    if form == "json":
        assert [row["Method"] for row in json.loads(out)] == list(METHODS)


def test_the_table_of_a_terminal_keeps_what_it_was_asked_for(listed):
    shown = job.narrow(listed)
    assert shown["Paper"][1] == "Q-Diffusion, ICCV 2023, arXiv:2302.04304"
    assert list(shown.columns) == [
        *("Method", "Paper", "Definition", "W/A", "Tables", "MiB", "G OPs", "Packs", "Recipes", "Digits")
    ]
    pd.testing.assert_series_equal(shown["MiB"], listed["Size (MiB)"], check_names=False)


def test_one_on_the_command_line(capsys):
    app(["methods", "reactnet", "-f", "json"], standalone_mode=False)
    rows = {row["Key"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["printed as"]["Value"] == "ReActNet"


def test_an_unknown_method(bdm):
    with pytest.raises(BdmError, match="unknown method 'bid'"):
        job.one("bid")
    code, out, err = bdm("methods", "reacnet")
    assert (code, out) == (2, "")
    assert err.startswith("bdm: unknown method 'reacnet'. Did you mean 'reactnet'?\n  known: baseline, ")
