"""The transcription of the paper's tables: complete, consistent and right at spot checks.

Counts and spot values were taken from the paper's text by hand, not from cells.csv.
"""

import csv
import math
import re
import tomllib
from collections import Counter
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[2] / "bdm_cli" / "paper"
HEADER = ["table", "row", "column", "recipe", "twin", "metric", "value"]
TABLES = [str(n) for n in range(1, 17)] + ["P1", "P2", "B4", "BA", "BC"]
DATASETS = "cifar10|bedrooms|churches|ffhq|imagenet"
METHODS = (
    "baseline|ebb|highorder|lsq|qdiffusion|efficientdm|"
    "tdq|reactnet|qdm|instabnn|bidiffsr|xnorpp|bbcu|dorefa|reste|xnor|bidm"
)
OURS = "digits|digits-ldm|digits-cond"
RECIPE = re.compile(rf"({DATASETS}|{OURS})-(fp|w\d+a\d+(-({METHODS}))?)(\+[a-z]+\.[a-z_]+=[a-z0-9.-]+)*")
NO_TWIN = {"size_mb", "bops_g", "flops_g", "ops_g", "size_saving", "ops_saving", "time_h", "runtime_us", "speedup"}

# rows x columns, less the cells printed as "-"
COUNTS = {
    "1": 10 * 4,
    "2": 18 * 5 - 3 + 13 * 5 - 3 + 10 * 5 - 3 * 2,
    "3": 3 * 7 * 4,
    "4": 4 * 4,
    "5": 5 * 3,
    "6": 4 * 3,
    "7": 4 * 4,
    "8": 2 * 5,
    "9": 5 * 5,
    "10": 5 * 4,
    "11": 4 * 4,
    "12": 3 * 4,
    "13": 3 * 5,
    "14": 5 * 4,
    "15": 3 * 2,
    "16": 3 * 3 + 2,
    "P1": 7 * 4,
    "P2": (9 + 7 + 7) * 4,
    "B4": 6,
    "BA": 6,
    "BC": 4,
}

BED = "LDM-4 | LSUN-Bedrooms 256x256 | "
CHU = "LDM-8 | LSUN-Churches 256x256 | "
FFHQ = "LDM-4 | FFHQ 256x256 | "
CIFAR = "DDIM | CIFAR-10 32x32 | "

SPOTS = [
    ("1", "FP | 32/32", "sFID", "4.64"),
    ("1", "LSQ | 2/4", "FID", "137.75"),
    ("1", "Baseline | 1/4", "IS", "5.92"),
    ("1", "BinaryDM | 1/4", "Prec.", "37.25"),
    ("2", BED + "FP | 32/32", "Size (MB)", "1045.4"),
    ("2", BED + "EfficientDM | 4/4", "FID", "10.60"),
    ("2", BED + "INSTA-BNN | 1/4", "Recall", "31.08"),
    ("2", BED + "BI-DiffSR | 1/4", "sFID", "11.81"),
    ("2", BED + "BinaryDM | 1/4", "FID", "7.74"),
    ("2", CHU + "Q-Diffusion | 4/4", "Recall", "0.12"),
    ("2", CHU + "LSQ | 2/4", "Size (MB)", "74.1"),
    ("2", CHU + "BinaryDM | 1/4", "Precision", "73.72"),
    ("2", FFHQ + "Q-Diffusion | 4/8", "sFID", "9.06"),
    ("2", FFHQ + "BinaryDM | 1/4", "FID", "12.34"),
    ("3", "DDIM | BinaryDM | 1/4", "IS", "208.42"),
    ("3", "PLMS | FP | 32/32", "FID", "13.54"),
    ("3", "PLMS | BinaryDM | 1/4", "Prec.", "88.74"),
    ("3", "DPM-Solver | Baseline | 1/4", "sFID", "26.72"),
    ("3", "DPM-Solver | BinaryDM | 1/4", "IS", "206.80"),
    ("4", "Vanilla | 1/32", "FID", "8.43"),
    ("4", "+EBB | 1/32", "sFID", "12.34"),
    ("4", "+LRM | 1/32", "Recall", "36.80"),
    ("5", "LDM-4 | Full-Precision | 32/32", "OPs (1e9)", "96.0"),
    ("5", "LDM-4 | EfficientDM | 4/4", "OPs (1e9)", "24.3"),
    ("5", "LDM-4 | LSQ | 2/4", "FID", "12.95"),
    ("5", "LDM-4 | BinaryDM | 1/4", "Size (MB)", "35.8"),
    ("6", "LSUN-Bedrooms | Q-Diffusion | 4/4", "Time (h)", "13.7"),
    ("6", "LSUN-Bedrooms | BinaryDM | 1/4", "FID", "13.93"),
    ("6", "LSUN-Churches | BinaryDM | 1/4", "Time (h)", "9.0"),
    ("7", "Vanilla | 1/4", "FID", "10.87"),
    ("7", "+EBB | 1/4", "Prec.", "62.94"),
    ("7", "+LRM | 1/4", "sFID", "10.80"),
    ("8", "Baseline | 1/32", "1e1", "0.388"),
    ("8", "Baseline | 1/32", "1e5", "0.158"),
    ("8", "+EBB | 1/32", "1e3", "0.242"),
    ("9", "0 | 0 | 1/32", "1e5", "0.141"),
    ("9", "6 | 0 | 1/32", "1e3", "0.199"),
    ("9", "12 | 0 | 1/32", "1e2", "0.223"),
    ("9", "12 | 1 | 1/32", "1e4", "0.188"),
    ("10", "0 | 0 | 1/32", "FID", "8.02"),
    ("10", "3 | 0 | 1/32", "Recall", "34.98"),
    ("10", "12 | 0 | 1/32", "sFID", "12.22"),
    ("10", "12 | 1 | 1/32", "Precision", "66.41"),
    ("11", "0 | 1/32", "FID", "8.01"),
    ("11", "9e-3 | 1/32", "Prec.", "65.10"),
    ("11", "9e-4 | 1/32", "sFID", "11.83"),
    ("12", "0 | 1/32", "FID", "8.22"),
    ("12", "10000 | 1/32", "Recall", "36.18"),
    ("12", "100000 | 1/32", "sFID", "12.15"),
    ("13", "Baseline | 1/32", "1e4", "0.227"),
    ("13", "L_MSE | 1/32", "1e2", "0.303"),
    ("13", "L_LRM | 1/32", "1e5", "0.151"),
    ("14", "- | - | 1/32", "FID", "7.39"),
    ("14", "L_MSE | - | 1/32", "Prec.", "62.05"),
    ("14", "L_LRM | 2 | 1/32", "Recall", "36.00"),
    ("14", "L_LRM | 8 | 1/32", "FID", "6.95"),
    ("15", "0 (w/o LRM) | 1/32", "sFID", "12.34"),
    ("15", "100 | 1/32", "FID", "7.11"),
    ("15", "infinity (BinaryDM) | 1/32", "FID", "6.99"),
    ("16", "FP | 32/32", "Runtime (us/convolution)", "176371.0"),
    ("16", "High-Order | 1/4", "Size (MB)", "70.2"),
    ("16", "High-Order | 1/4", "Speed-up", "3.11"),
    ("16", "BinaryDM | 1/4", "Speed-up", "4.62"),
    ("16", "BinaryDM | 1/4", "Theoretical OPs (1e9)", "6.3"),
    ("P1", CIFAR + "FP | 32/32", "sFID", "4.46"),
    ("P1", CIFAR + "XNOR++ | 1/1", "FID", "251.14"),
    ("P1", CIFAR + "ReSTE | 1/1", "Precision", "0.18"),
    ("P1", CIFAR + "BiDM | 1/1", "IS", "5.18"),
    ("P2", BED + "BBCU | 1/1", "FID", "236.07"),
    ("P2", BED + "BiDM | 1/1", "FID", "22.74"),
    ("P2", CHU + "DoReFa | 1/1", "Recall", "0.74"),
    ("P2", CHU + "XNOR | 1/1", "sFID", "49.24"),
    ("P2", FFHQ + "ReActNet | 1/1", "Precision", "3.36"),
    ("P2", FFHQ + "BiDM | 1/1", "Recall", "13.96"),
    ("B4", "BiDM | 1/1", "Size (MB)", "37.3"),
    ("B4", "BiDM | 1/1", "FLOPs (1e9)", "0.38"),
    ("B4", "BiDM | 1/1", "OPs saving", "52.7"),
    ("BA", "SPD | 1/1", "FID", "40.62"),
    ("BA", "Learnable k | 1/1", "FID", "57.26"),
    ("BA", "TBS and L2 | 1/1", "FID", "26.07"),
    ("BC", "0 | 1/1", "FID", "30.24"),
    ("BC", "1 | 1/1", "FID", "24.22"),
    ("BC", "12 | 1/1", "FID", "23.25"),
]

# (table, row, column) -> recipe, twin
RECIPES = [
    ("1", "BinaryDM | 1/4", "IS", "cifar10-w1a4", "digits-w1a4"),
    ("2", BED + "FP | 32/32", "FID", "bedrooms-fp", "digits-ldm-fp"),
    ("2", BED + "FP | 32/32", "Size (MB)", "bedrooms-fp", ""),
    ("2", BED + "BI-DiffSR | 1/4", "FID", "bedrooms-w1a4-bidiffsr", "digits-ldm-w1a4-bidiffsr"),
    (
        "3",
        "DPM-Solver | FP | 32/32",
        "IS",
        "imagenet-fp+sample.sampler=dpm-solver",
        "digits-cond-fp+sample.sampler=dpm-solver",
    ),
    ("4", "+EBB | 1/32", "FID", "bedrooms-w1a32-ebb", "digits-w1a32-ebb"),
    ("5", "LDM-4 | LSQ | 2/4", "OPs (1e9)", "bedrooms-w2a4-lsq", ""),
    ("6", "LSUN-Churches | Q-Diffusion | 4/4", "Size (MB)", "churches-w4a4-qdiffusion", ""),
    (
        "6",
        "LSUN-Churches | Q-Diffusion | 4/4",
        "FID",
        "churches-w4a4-qdiffusion",
        "digits-ldm-w4a4-qdiffusion",
    ),
    ("6", "LSUN-Churches | BinaryDM | 1/4", "FID", "", ""),
    ("6", "LSUN-Bedrooms | BinaryDM | 1/4", "Time (h)", "", ""),
    ("7", "+LRM | 1/4", "FID", "bedrooms-w1a4", "digits-w1a4"),
    ("8", "+EBB | 1/32", "1e1", "bedrooms-w1a32-ebb", ""),
    ("9", "3 | 0 | 1/32", "1e1", "bedrooms-w1a32+method.ebb_scope=3", ""),
    (
        "10",
        "3 | 0 | 1/32",
        "FID",
        "bedrooms-w1a32+method.ebb_scope=3",
        "digits-w1a32+method.ebb_scope=2",
    ),
    ("10", "6 | 0 | 1/32", "FID", "bedrooms-w1a32", "digits-w1a32"),
    (
        "10",
        "12 | 1 | 1/32",
        "FID",
        "bedrooms-w1a32+method.ebb_center=true+method.ebb_scope=12",
        "digits-w1a32+method.ebb_center=true+method.ebb_scope=6",
    ),
    (
        "11",
        "0 | 1/32",
        "FID",
        "bedrooms-w1a32+method.tau=0",
        "digits-w1a32+method.tau=0",
    ),
    (
        "12",
        "10000 | 1/32",
        "FID",
        "bedrooms-w1a32+method.transition=10000",
        "digits-w1a32+method.transition=0.05",
    ),
    ("13", "L_MSE | 1/32", "1e1", "bedrooms-w1a32+method.distillation=mse", ""),
    ("13", "L_LRM | 1/32", "1e1", "bedrooms-w1a32", ""),
    (
        "14",
        "L_LRM | 2 | 1/32",
        "FID",
        "bedrooms-w1a32+method.lrm_k=2",
        "digits-w1a32+method.lrm_k=2",
    ),
    ("14", "L_LRM | 4 | 1/32", "FID", "bedrooms-w1a32", "digits-w1a32"),
    ("15", "0 (w/o LRM) | 1/32", "FID", "bedrooms-w1a32-ebb", "digits-w1a32-ebb"),
    ("16", "High-Order | 1/4", "Size (MB)", "bedrooms-w1a4-highorder", ""),
    ("P1", CIFAR + "XNOR++ | 1/1", "IS", "cifar10-w1a1-xnorpp", "digits-w1a1-xnorpp"),
    ("P2", FFHQ + "FP | 32/32", "FID", "ffhq-fp+sample.steps=200", "digits-fp"),
    ("P2", FFHQ + "BiDM | 1/1", "FID", "ffhq-w1a1-bidm", "digits-w1a1-bidm"),
    ("BA", "Vanilla | 1/1", "FID", "bedrooms-w1a1-xnor", "digits-w1a1-xnor"),
    ("BA", "TBS and SPD (BiDM) | 1/1", "FID", "bedrooms-w1a1-bidm", "digits-w1a1-bidm"),
    ("BC", "8 | 1/1", "FID", "bedrooms-w1a1-bidm", "digits-w1a1-bidm"),
    (
        "BC",
        "12 | 1/1",
        "FID",
        "bedrooms-w1a1-bidm+method.connections=12",
        "digits-w1a1-bidm+method.connections=6",
    ),
]


@pytest.fixture(scope="module")
def cells():
    with open(DATA / "cells.csv", newline="", encoding="utf-8") as f:
        reader = csv.DictReader(f)
        assert reader.fieldnames == HEADER
        rows = list(reader)
    assert all(None not in r and None not in r.values() for r in rows)
    return rows


@pytest.fixture(scope="module")
def tables():
    with open(DATA / "tables.toml", "rb") as f:
        return tomllib.load(f)["table"]


@pytest.fixture(scope="module")
def lookup(cells):
    return {(c["table"], c["row"], c["column"]): c for c in cells}


def test_all_tables_are_present_in_order(cells, tables):
    assert [t["id"] for t in tables] == TABLES
    assert list(dict.fromkeys(c["table"] for c in cells)) == TABLES


def test_tables_are_well_formed(tables):
    for t in tables:
        assert set(t) - {"accounting"} == {"id", "title", "source", "labels", "columns", "notes"}
        assert t["title"]
        if t["id"].startswith("P"):
            assert t["source"] == f"BiDM poster, NeurIPS 2024, Table {t['id'][1:]}"
        elif t["id"].startswith("B"):
            where = f"Table {t['id'][1:]}" if t["id"][1:].isdigit() else "its ablations"
            assert t["source"].startswith(f"BiDM, arXiv:2412.05926, {where}, as quoted")
        else:
            assert t["source"] == f"BinaryDM, arXiv:2404.05662, Table {t['id']}"
        names = [c["name"] for c in t["columns"]]
        assert len(names) == len(set(names))
        for c in t["columns"]:
            assert set(c) == {"name", "metric", "better"}
            assert c["better"] in ("higher", "lower", "")
        assert all(isinstance(n, str) and n for n in [*t["notes"], *t.get("accounting", [])])


def test_cells_are_unique(cells):
    count = Counter((c["table"], c["row"], c["column"]) for c in cells)
    assert [k for k, n in count.items() if n > 1] == []


def test_columns_and_labels_agree_with_tables(cells, tables):
    metric = {t["id"]: {c["name"]: c["metric"] for c in t["columns"]} for t in tables}
    labels = {t["id"]: t["labels"] for t in tables}
    for c in cells:
        assert metric[c["table"]].get(c["column"]) == c["metric"], c
        parts = c["row"].split(" | ")
        assert len(parts) == len(labels[c["table"]]), c
        assert all(parts), c
    for t in tables:
        used = {c["column"] for c in cells if c["table"] == t["id"]}
        assert used == set(metric[t["id"]]), t["id"]


def test_cells_stand_in_printed_order(cells, tables):
    for t in tables:
        mine = [c for c in cells if c["table"] == t["id"]]
        row = {r: i for i, r in enumerate(dict.fromkeys(c["row"] for c in mine))}
        column = {c["name"]: i for i, c in enumerate(t["columns"])}
        place = [(row[c["row"]], column[c["column"]]) for c in mine]
        assert place == sorted(place), t["id"]


def test_counts(cells):
    assert dict(Counter(c["table"] for c in cells)) == COUNTS


@pytest.mark.parametrize(("table", "row", "column", "value"), SPOTS)
def test_spot_values(lookup, table, row, column, value):
    assert lookup[table, row, column]["value"] == value


def test_every_table_has_three_spot_values():
    count = Counter(s[0] for s in SPOTS)
    assert all(count[t] >= 3 for t in TABLES)


def test_values_are_numbers(cells):
    for c in cells:
        assert re.fullmatch(r"\d+\.\d+", c["value"]), c
        value = float(c["value"])
        assert math.isfinite(value)
        if c["metric"] in ("precision", "recall"):
            assert 0 <= value <= 100, c
        elif c["metric"].startswith("loss_simple@"):
            assert 0 < value < 1, c
        else:
            assert value > 0, c


def test_recipes_and_twins_are_well_formed(cells):
    for c in cells:
        for name in (c["recipe"], c["twin"]):
            if name:
                assert RECIPE.fullmatch(name), c
                keys = [p.split("=")[0] for p in name.split("+")[1:]]
                assert keys == sorted(keys), c
        assert not c["recipe"].startswith("digits-"), c
        if c["metric"] in NO_TWIN or c["metric"].startswith("loss_simple@") or not c["recipe"]:
            assert c["twin"] == "", c
        else:
            assert c["twin"].startswith("digits-"), c


def test_bits_of_recipe_match_the_label(cells):
    for c in cells:
        if not c["recipe"]:
            continue
        w, a = c["row"].split(" | ")[-1].split("/")
        for name in (c["recipe"], c["twin"]):
            if name:
                bits = "fp" if w == "32" else f"w{w}a{a}"
                assert re.split(r"[-+]", re.sub("^digits-(ldm|cond)", "digits", name))[1] == bits, c


@pytest.mark.parametrize(("table", "row", "column", "recipe", "twin"), RECIPES)
def test_spot_recipes(lookup, table, row, column, recipe, twin):
    cell = lookup[table, row, column]
    assert (cell["recipe"], cell["twin"]) == (recipe, twin)


def test_repeated_numbers_of_the_paper_agree(lookup):
    """Numbers the paper prints in two tables; a slip of the transcription would break a pair."""
    pairs = [
        (("4", "Vanilla | 1/32"), ("2", BED + "Baseline | 1/32")),
        (("4", "+LRM | 1/32"), ("2", BED + "BinaryDM | 1/32")),
        (("7", "Vanilla | 1/4"), ("2", BED + "Baseline | 1/4")),
        (("7", "+LRM | 1/4"), ("2", BED + "BinaryDM | 1/4")),
        (("4", "FP | 32/32"), ("7", "FP | 32/32")),
        (("4", "+EBB | 1/32"), ("14", "- | - | 1/32")),
        (("4", "+LRM | 1/32"), ("10", "6 | 0 | 1/32")),
        (("4", "+LRM | 1/32"), ("11", "9e-2 | 1/32")),
        (("4", "+LRM | 1/32"), ("12", "100000 | 1/32")),
        (("4", "+LRM | 1/32"), ("14", "L_LRM | 4 | 1/32")),
        (("8", "Baseline | 1/32"), ("13", "Baseline | 1/32")),
        (("8", "+EBB | 1/32"), ("13", "L_LRM | 1/32")),
    ]

    def row(table, name):
        return {
            c["metric"]: c["value"]
            for (t, r, _), c in lookup.items()
            if (t, r) == (table, name) and c["metric"] != "size_mb"
        }

    for a, b in pairs:
        assert row(*a), a
        assert row(*a) == row(*b), (a, b)
