"""`bdm efficiency`: the numbers of Eqs. 16-17 for the networks of the recipes, beside the papers'."""

import json
import math

import pandas as pd
import pytest

from bdm_cli.cli import app
from bdm_cli.errors import BdmError
from bdm_cli.jobs import efficiency
from bdm_cli.jobs.efficiency import Asked
from bdm_cli.methods import METHODS
from bdm_cli.output import Format
from bdm_cli.paper import tables

PAPER = ["ddim-cifar10", "ldm4-bedrooms", "ldm4-ffhq", "ldm4-imagenet", "ldm8-churches"]


def run(*arguments, **options):
    return efficiency.run(*arguments, **options)[0]


def row(table, bits, structure="plain", edges=32):
    found = table[(table["W/A"] == bits) & (table["Structure"] == structure) & (table["Edges"] == edges)]
    assert len(found) == 1
    return found.iloc[0]


def test_w1a4_ldm_4_beside_tables_5_and_16():
    table = run("1/4", "ldm4-bedrooms")
    assert list(zip(table["Structure"], table["W/A"], table["Edges"], strict=True)) == [
        ("plain", "32/32", 32),
        ("plain", "1/4", 8),
        ("plain", "1/4", 32),
        ("high-order", "1/4", 8),
        ("high-order", "1/4", 32),
    ]
    assert table["Size (MiB)"].round(1).tolist() == [1045.4, 34.4, 37.3, 67.1, 70.0]
    assert table["Paper: Size (MB)"].tolist() == [1045.4, 35.8, 35.8, 70.2, 70.2]
    assert table["Size difference (%)"].tolist() == [0.0, -3.92, 4.18, -4.39, -0.26]
    assert table["OPs (G)"].round(2).tolist() == [96.02, 6.05, 6.05, 12.05, 12.05]
    assert table["Paper: OPs (G)"].tolist() == [96.0, 6.3, 6.3, 12.6, 12.6]
    assert table["OPs difference (%)"].tolist() == [0.02, -3.99, -3.99, -4.39, -4.39]
    assert table["Size saving"].tolist() == [1, 30.4, 28.0, 15.6, 14.9]
    assert table["OPs saving"].tolist() == [1, 15.9, 15.9, 8.0, 8.0]
    assert table["Paper's tables"].tolist() == ["2, 5, 16", "2, 5, 6, 16", "2, 5, 6, 16", "16", "16"]


def test_bidm_beside_its_savings():
    table = run("1/1", "ldm4-bedrooms")
    released, own = row(table, "1/1", "bidm"), row(table, "1/1", "bidm-paper")
    assert (released["Size (MiB)"], released["OPs (G)"]) == (111.55, 9.368)
    assert row(table, "1/1", "bidm", 8)["Size (MiB)"] == 108.65
    assert (own["Size (MiB)"], own["BOPs (G)"], own["FLOPs (G)"]) == (37.3, 92.088, 3.93)
    for found in (released, own):
        assert (found["Paper: Size (MB)"], found["Paper: BOPs (G)"], found["Paper: FLOPs (G)"]) == (37.3, 92.1, 0.38)
        assert (found["Paper: Size saving"], found["Paper: OPs saving"]) == (28.0, 52.7)
    assert (released["Size saving"], released["OPs saving"], own["Size saving"]) == (9.4, 10.3, 28.0)
    assert math.isnan(row(table, "1/1")["Paper: Size (MB)"])


def test_two_bases_in_head_and_tail():
    """W1.1A4 of BinaryDM's early versions: 24.8x and, with 0.25 G of unspecified work, 9.3x."""
    found = row(run("1/4", "ldm4-bedrooms", structure="lmb"), "1/4", "lmb")
    assert (found["Size (MiB)"], found["OPs (G)"], found["Size saving"]) == (42.1, 10.034, 24.8)


def test_ldm_8_has_a_size_in_table_2_and_no_ops():
    table = run("2/8", "ldm8-churches")
    assert table["Size (MiB)"].round(1).tolist()[::2] == [1125.2, 74.1]
    assert table["OPs (G)"].round(2).tolist()[0] == 18.64
    assert table["Paper: Size (MB)"].tolist() == [1125.2, 74.1, 74.1]
    assert table["Paper: OPs (G)"].isna().all()


def test_all_networks_of_the_paper_at_all_its_bits():
    table, notes = efficiency.run()
    assert table["Model"].unique().tolist() == PAPER
    for name, part in table.groupby("Model"):
        assert part["W/A"].unique().tolist() == list(efficiency.ALL_BITS), name
        plain = part[part["Structure"] == "plain"]
        assert len(plain) == 1 + 2 * 11
        assert plain[plain["W/A"] == "8/8"]["OPs saving"].tolist() == [1.0, 1.0]  # Eq. 17: 64 BOPs are one OP
    assert set(table["Structure"]) == {"plain", "high-order", "bidm", "bidm-paper"}
    assert set(table[table["Structure"] != "plain"]["Model"]) == {"ldm4-bedrooms"}
    assert table["Structure"].tolist().count("bidm") == 2
    told = [f"Table {id}: {note}" for id, spec in tables.specs().items() for note in spec.accounting]
    assert notes == told


def test_all_bits_are_those_of_the_papers_tables():
    labels = tables.cells()["row"].str.split(" | ", regex=False).str[-1]
    assert set(labels) == set(efficiency.ALL_BITS)


def test_every_network_of_the_recipes_can_be_counted():
    known = efficiency.models()
    assert [name for name in known if not name.endswith(("digits", "digits-cond"))] == PAPER
    assert list(known)[: len(PAPER)] == PAPER
    assert len(known) == 8
    for name in list(known)[len(PAPER) :]:
        table, notes = efficiency.run("1/4", name)
        assert len(table) == 3
        assert notes == []
        assert (table["Size saving"][1:] > 10).all()
        assert (table["OPs saving"][1:] > 10).all()


def test_full_precision_is_one_row():
    assert run("32/32", "ldm4-bedrooms")["Size (MiB)"].round(1).tolist() == [1045.4]


@pytest.mark.parametrize(("edges", "sizes"), [("8", [34.4]), ("32", [37.3]), ("both", [34.4, 37.3])])
def test_edges(edges, sizes):
    table = run("1/8", "ldm4-bedrooms", edges)
    assert table["Size (MiB)"].tolist()[1:] == sizes


@pytest.mark.parametrize(
    ("scales", "size", "ops"), [("none", 37.1, 6.049), ("paper", 37.3, 6.049), ("all", 37.46, 6.087)]
)
def test_scales(scales, size, ops):
    found = row(run("1/4", "ldm4-bedrooms", scales=scales), "1/4")
    assert (found["Size (MiB)"], found["OPs (G)"]) == (size, ops)


def test_attention_products_in_full_precision():
    table = run("1/4", "ldm4-bedrooms", attention=True)
    full, few = row(table, "32/32"), row(table, "1/4")
    assert (full["OPs (G)"], few["OPs (G)"], few["OPs saving"]) == (101.2, 11.231, 9.0)
    assert few["Size (MiB)"] == 37.3


def test_a_structure_keeps_to_its_bits():
    table = run(model="ldm8-churches", structure="high-order", edges="32")
    assert table["W/A"].tolist() == ["32/32", "1/32", "1/8", "1/4", "1/1"]
    assert run(model="ldm8-churches", structure="bidm", edges="32")["W/A"].tolist() == ["32/32", "1/1"]
    assert run("2/4", "ldm8-churches")["Structure"].tolist() == ["plain"] * 3


# ---- by layer and by block -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", efficiency.FORMS)
@pytest.mark.parametrize("by", ["layer", "block"])
def test_parts_add_up_to_the_whole(by, structure):
    bits = "1/1"
    whole = row(run(bits, "ldm4-bedrooms", "8", structure, "all", True), bits, structure, 8)
    table = efficiency.parts(by, bits, "ldm4-bedrooms", None, structure, "all", True)
    rows, last = table[:-1], table.iloc[-1]
    assert last.iloc[0] == "total"
    for what in ("Size (MiB)", "BOPs (G)", "FLOPs (G)", "OPs (G)"):
        assert rows[what].sum() == pytest.approx(last[what], abs=1e-3)
        assert last[what] == pytest.approx(whole[what], abs=6e-3)
    assert rows["Size share (%)"].sum() == pytest.approx(100, abs=0.01)
    assert rows["OPs share (%)"].sum() == pytest.approx(100, abs=0.01)


def test_by_block_of_ldm_4():
    table = efficiency.parts("block", "1/4", "ldm4-bedrooms")
    assert table["Block"].tolist() == [*map(str, range(25)), "outside", "total"]
    assert table["Region"].tolist()[:25] == ["head"] * 6 + ["body"] * 13 + ["tail"] * 6
    assert table["Modules"][15] == "up_blocks.0: resnets.2, attentions.2, upsamplers.0"
    assert table["Layers"].tolist()[-2:] == [3, 155]
    both_ends = table[table["Region"].isin(["head", "tail"])]
    assert both_ends["MACs (G)"].sum() / table["MACs (G)"].iloc[-1] == pytest.approx(0.664, abs=0.001)


def test_by_layer_of_ldm_4():
    table = efficiency.parts("layer", "1/4", "ldm4-bedrooms").set_index("Layer")
    first = table.loc["conv_in"]
    assert first[["Block", "Region", "Kind", "Shape", "W/A"]].tolist() == ["0", "edge", "conv", "224x3x3x3", "8/8"]
    assert (first["MACs (G)"], first["BOPs (G)"]) == (0.024773, 1.585447)
    query = table.loc["up_blocks.0.attentions.0.to_q"]
    assert query[["Block", "Region", "Kind", "W/A"]].tolist() == ["13", "body", "projection", "1/4"]
    assert table.loc["conv_norm_out"][["Block", "Region", "Kind"]].tolist() == ["", "outside", "other"]
    assert (table["Kind"] == "attention").sum() == 0
    counted = efficiency.parts("layer", "1/4", "ldm4-bedrooms", attention=True)
    assert (counted["Kind"] == "attention").sum() == 16
    assert (efficiency.parts("layer", "1/4", "ldm4-bedrooms", "32").set_index("Layer").loc["conv_in"]["W/A"]) == "32/32"


# ---- recipes as their methods build them -----------------------------------------------------------------------------


def of(name, overrides=()):
    return efficiency.chosen(Asked(recipe=name, overrides=overrides))


def test_a_recipe_beside_the_paper_and_beyond_plain():
    """ReActNet: a threshold per input channel, and around convs three numbers per output channel."""
    table, notes = efficiency.built(of("bedrooms-w1a4-reactnet"))
    (found,) = table.to_dict("records")
    assert (found["Recipe"], found["Method"], found["Model"]) == (
        "bedrooms-w1a4-reactnet",
        "reactnet",
        "ldm4-bedrooms",
    )
    assert (found["W/A"], found["Edges"], found["Weights in fp32 (%)"]) == ("1/4", 8, 0)
    plain = row(run("1/4", "ldm4-bedrooms"), "1/4", edges=8)
    assert found["Size (MiB)"] - plain["Size (MiB)"] == pytest.approx(found["Beyond plain: Size (MiB)"], abs=0.01)
    assert found["OPs (G)"] - plain["OPs (G)"] == pytest.approx(found["Beyond plain: OPs (G)"], abs=0.001)
    assert found["BOPs (G)"] == plain["BOPs (G)"]
    assert found["Beyond plain: Size (MiB)"] > 0.5
    assert (found["Paper: Size (MB)"], found["Paper's tables"]) == (35.8, "2")
    assert [note for note in notes if "ReActNet" in note]
    assert all(note.startswith("Table 2: ") for note in notes)


def test_recipes_of_the_tables_rows_that_add_nothing_are_plain():
    table, _ = efficiency.built(efficiency.chosen(Asked(method="lsq, baseline,ebb", model="ldm4-bedrooms")))
    assert table["Method"].unique().tolist() == ["lsq", "baseline", "ebb"]
    assert (table[["Beyond plain: Size (MiB)", "Beyond plain: OPs (G)"]] == 0).all(axis=None)
    for found in table.to_dict("records"):
        same = row(run(found["W/A"], "ldm4-bedrooms"), found["W/A"], edges=8)
        for what in ("Size (MiB)", "BOPs (G)", "FLOPs (G)", "OPs (G)", "Size saving", "OPs saving"):
            assert found[what] == same[what]


def test_chosen_by_method_bits_and_network():
    def names(method, bits=None, model=None):
        return [spec.name for spec in efficiency.chosen(Asked(bits, model, method=method))]

    assert names("lsq", "2/4") == [f"{data}-w2a4-lsq" for data in ("cifar10", "bedrooms", "churches")]
    assert names("fp", None, "ldm4-bedrooms") == ["bedrooms-fp"]
    assert names("binarydm,lsq", "1/4", "ddim-digits") == ["digits-w1a4"]
    every = efficiency.chosen(Asked(method="all", model="ldm4-bedrooms"))
    assert {spec.method["name"] for spec in every} == METHODS.keys()
    assert efficiency.chosen(Asked("1/4", "ldm4-bedrooms", "8", "plain"), "layer") == []


def test_a_recipe_with_other_fields():
    (spec,) = of("bedrooms-w1a4", ["method.edge_bits=32"])
    table, _ = efficiency.built([spec])
    assert (table["Recipe"][0], table["Edges"][0]) == ("bedrooms-w1a4+method.edge_bits=32", 32)
    assert table["Size (MiB)"][0] == 37.3
    assert math.isnan(table["Paper: Size (MB)"].astype(float)[0])


def test_a_recipe_taken_apart():
    (spec,) = of("bedrooms-w1a1-bidm")
    whole = efficiency.built([spec], "all", True)[0].iloc[0]
    blocks = efficiency.parts_built("block", spec, "all", True)
    assert blocks["Block"].tolist() == [*map(str, range(25)), "outside", "total"]
    layers = efficiency.parts_built("layer", spec, "all", True)
    for table in (blocks, layers):
        for what in ("Size (MiB)", "BOPs (G)", "OPs (G)"):
            assert table[what].iloc[-1] == pytest.approx(whole[what], abs=6e-3)
    assert layers[layers["Kind"] == "extra"]["Block"].tolist() == [str(block) for block in range(17, 25)]
    bits = layers.set_index("Layer")["W/A"]
    assert (bits["conv_in"], bits["up_blocks.0.resnets.0.conv1"]) == ("32/32", "1/1")
    assert bits["up_blocks.0.resnets.0.conv_shortcut"] == "32/32"


@pytest.mark.parametrize("form", Format)
def test_recipes_in_every_form(form, capsys):
    app(["efficiency", "--method", "lsq,bidm", "--model", "ddim-digits", "--format", form.value], standalone_mode=False)
    out, err = capsys.readouterr()
    assert err == ""
    assert "nan" not in out.lower()
    if form == Format.json:
        rows = json.loads(out)
        assert {"Recipe", "Method", "Weights in fp32 (%)", "Beyond plain: Size (MiB)"} <= rows[0].keys()
        assert [line["Method"] for line in rows] == ["lsq"] * 3 + ["bidm"]
    if form == Format.table:
        assert max(len(line.rstrip()) for line in out.splitlines()) <= 120


def test_a_recipe_by_block_on_the_command_line(capsys):
    app(["efficiency", "--recipe", "digits-w1a4-reactnet", "--by-block", "-f", "csv"], standalone_mode=False)
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines()[-1].startswith("total")


# ---- what people see -------------------------------------------------------------------------------------------------


def test_a_terminal_has_one_table_per_network_and_programs_have_all_columns():
    table = run("1/1")
    named = efficiency.sheets(table, Format.table)
    assert [title.partition(":")[0] for title, _ in named] == PAPER
    bidm = dict(named)["ldm4-bedrooms: size and operations"]
    assert bidm["W/A"].tolist() == ["32/32", "1/1", "1/1"] + ["1/1 bidm"] * 2 + ["1/1 bidm-paper"] * 2
    assert bidm["Size %"].tolist()[-3:] == ["+199.1", "-7.8", "-0.0"]
    assert bidm["OPs x"].tolist() == ["1.0", "61.9", "61.9", *["10.3 (52.7)"] * 2, *["17.9 (52.7)"] * 2]
    assert list(named[0][1].columns) == ["W/A", "Edges", "Size MiB", "OPs G", "Size x", "OPs x"]  # nothing printed
    for form in (Format.md, Format.latex):
        ((_, short),) = efficiency.sheets(table, form)
        assert short.columns[0] == "Model"
        assert len(short) == len(table)
    for form in (Format.json, Format.csv):
        ((_, whole),) = efficiency.sheets(table, form)
        pd.testing.assert_frame_equal(whole, table)


@pytest.mark.parametrize("by", ["layer", "block"])
@pytest.mark.parametrize("form", Format)
def test_parts_in_every_form(by, form, capsys):
    app(
        ["efficiency", "--bits", "1/4", "--model", "ddim-digits", f"--by-{by}", "--format", form.value],
        standalone_mode=False,
    )
    out, err = capsys.readouterr()
    assert err == ""
    assert "total" in out
    assert "nan" not in out.lower()
    if form == Format.json:
        rows = json.loads(out)
        assert {"MACs (G)", "Size (MiB)", "BOPs (G)", "FLOPs (G)", "OPs (G)", "OPs share (%)"} <= rows[0].keys()
    if form == Format.table:
        assert max(len(line.rstrip()) for line in out.splitlines()) <= 120


@pytest.mark.parametrize("form", Format)
def test_the_table_in_every_form(form, capsys):
    options = ["--edges", "32", "--structure", "bidm", "--scales", "all", "--attention"]
    app(["efficiency", "--model", "ldm4-bedrooms", *options, "--format", form.value], standalone_mode=False)
    out, err = capsys.readouterr()
    assert "Table B4: " in err
    assert "52.7" in out
    assert "nan" not in out.lower()
    if form == Format.json:
        assert [line["W/A"] for line in json.loads(out)] == ["32/32", "1/1"]
    if form == Format.table:
        assert max(len(line.rstrip()) for line in out.splitlines()) <= 120


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "bits"), [("1/4", (1, 4)), (" 8/8 ", (8, 8)), ("1/32", (1, 32)), ("32/32", (32, 32))])
def test_bits(text, bits):
    assert efficiency.parse_bits(text) == bits


@pytest.mark.parametrize("text", ["", "4", "1-4", "0/4", "1/9", "1/16", "W1A4", "1/4/8", "a/b", "-1/4", "1/", "001/4"])
def test_bits_that_are_refused(text):
    with pytest.raises(BdmError, match=r"cannot read --bits .*\n  allowed: .*1\.\.8, or 32"):
        efficiency.parse_bits(text)


MISTAKES = {
    "model": (["--model", "ldm4-bedroom"], "unknown model 'ldm4-bedroom'. Did you mean 'ldm4-bedrooms'?"),
    "bits": (["--bits", ""], "cannot read --bits ''"),
    "edges": (["--edges", "16"], "unknown --edges '16'"),
    "structure": (["--structure", "highorder"], "unknown --structure 'highorder'. Did you mean 'high-order'?"),
    "scales": (["--scales", "some"], "unknown --scales 'some'"),
    "two bases of two bits": (
        ["--bits", "2/4", "--structure", "lmb"],
        "--structure lmb is not for --bits 2/4.\n  its bits: 1/any",
    ),
    "bidm at four bits": (
        ["--bits", "1/4", "--structure", "bidm"],
        "--structure bidm is not for --bits 1/4.\n  its bits: 1/1",
    ),
    "both tables": (["--by-layer", "--by-block"], "--by-layer and --by-block are two tables"),
    "no model": (["--by-layer", "--bits", "1/4"], "--by-layer takes one network at one choice of bits apart"),
    "no bits": (["--by-block", "--model", "ldm4-ffhq"], "name both, e.g. --model ldm4-ffhq --bits 1/4"),
    "both edges": (["--by-block", "--model", "ldm4-ffhq", "--bits", "1/4", "--edges", "both"], "allowed: 8 or 32"),
    "by block, structure": (
        ["--by-block", "--model", "ldm4-ffhq", "--bits", "1/8", "--structure", "bidm"],
        "--structure bidm is not for --bits 1/8",
    ),
    "by layer, model": (["--by-layer", "--model", "ldm4", "--bits", "1/8"], "unknown model 'ldm4'"),
    "bidm where no recipe builds it": (
        ["--model", "ldm4-imagenet", "--structure", "bidm"],
        "none of 'ldm4-imagenet' has that method.\n  networks that have one: ",
    ),
    "method": (["--method", "lsq,reactne"], "unknown method 'reactne'. Did you mean 'reactnet'?"),
    "method on a network": (["--method", "tdq", "--model", "ldm8-churches"], "method tdq on ldm8-churches.\n"),
    "method at bits": (["--method", "tdq", "--bits", "1/1"], "no recipe has the method tdq at 1/1.\n"),
    "method and structure": (["--method", "tdq", "--structure", "plain"], "--edges and --structure are for bits"),
    "recipe": (["--recipe", "bedrooms-w1a5"], "unknown recipe 'bedrooms-w1a5'"),
    "recipe and bits": (["--recipe", "bedrooms-w1a4", "--bits", "1/4"], "leave out --method, --bits and --model"),
    "recipe and edges": (["--recipe", "bedrooms-w1a4", "--edges", "8"], "--set method.edge_bits=32"),
    "recipe and scales": (["--recipe", "bedrooms-w1a4", "--scales", "some"], "unknown --scales 'some'"),
    "overrides alone": (["--set", "method.edge_bits=32"], "--set changes one recipe.\n  name it: --recipe NAME"),
    "methods by layer": (["--method", "tdq", "--by-layer"], "--by-layer takes one network apart.\n  name its recipe"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name, capsys):
    arguments, text = MISTAKES[name]
    with pytest.raises(BdmError) as caught:
        app(["efficiency", *arguments], standalone_mode=False)
    assert text in str(caught.value)
    assert capsys.readouterr().out == ""


def test_a_mistake_is_one_message_and_exit_code_2(monkeypatch, capsys):
    from bdm_cli import cli

    monkeypatch.setattr("sys.argv", ["bdm", "efficiency", "--bits", "2/4", "--structure", "lmb"])
    with pytest.raises(SystemExit) as stopped:
        cli.entry()
    out, err = capsys.readouterr()
    assert (stopped.value.code, out) == (2, "")
    assert err == "bdm: --structure lmb is not for --bits 2/4.\n  its bits: 1/any\n"
