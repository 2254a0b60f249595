"""The paper's tables with our numbers beside its own: records joined to cells.csv by (recipe, metric).

A cell names two recipes: `recipe`, the paper's own setting, and `twin`, the same method on the digits miniature.
Records of the first fill the "ours" columns, records of the second the "digits" columns, and never the other way.
Sizes and operations are counted on the network rather than measured: without a record, "ours" is what was counted.
"""

import itertools
import math
import statistics
import tomllib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import NamedTuple

import pandas as pd

from bdm_cli import recipe
from bdm_cli.errors import unknown
from bdm_cli.recipe import Recipe
from bdm_cli.records import Record, newest

PAPER_IMAGES = 50_000
"""Generated images behind each FID, sFID, IS, precision and recall of the paper."""

COUNTED = ("size_mb", "bops_g", "flops_g", "ops_g", "size_saving", "ops_saving")
"""Metrics that follow from the network and its bits alone (metrics/cost.py)."""

UNTRAINED = (*COUNTED, "runtime_us", "speedup")
"""Metrics of the network's layers, which rest on neither images nor training."""

DAGGER = "†"
DOUBLE_DAGGER = "‡"

OURS_LEGEND = (
    '"ours": measured at the paper\'s scale, as mean ± sample standard deviation (number of seeds). '
    f"{DAGGER}: rests on fewer than {PAPER_IMAGES:,} images or on fewer training steps than the recipe says. "
    f"{DOUBLE_DAGGER}: not measured but counted on the network, with the recipe's edge bits (`bdm efficiency`)."
)
DIGITS_LEGEND = (
    '"digits": the miniature, measured on handwritten digits with small U-Nets and their own small feature network. '
    "These numbers are not comparable to the paper's; only their order among themselves says something."
)


@dataclass(frozen=True)
class Column:
    name: str
    metric: str
    better: str


@dataclass(frozen=True)
class TableSpec:
    """A table of the paper without its numbers.

    notes: what is known to be wrong or inconsistent in it; accounting: those of them on sizes and operations.
    """

    id: str
    title: str
    source: str
    labels: tuple[str, ...]
    columns: tuple[Column, ...]
    notes: tuple[str, ...]
    accounting: tuple[str, ...]


def cells() -> pd.DataFrame:
    """cells.csv, all columns as text: the paper's values stand as they are printed there."""
    with (resources.files("bdm_cli") / "paper" / "cells.csv").open(encoding="utf-8") as file:
        return pd.read_csv(file, dtype=str, keep_default_na=False)


def specs() -> dict[str, TableSpec]:
    """All tables by id, in the paper's order."""
    text = (resources.files("bdm_cli") / "paper" / "tables.toml").read_text(encoding="utf-8")
    found = {}
    for entry in tomllib.loads(text)["table"]:
        columns = tuple(Column(**column) for column in entry["columns"])
        accounting = tuple(entry.get("accounting", ()))
        notes = {"notes": (*entry["notes"], *accounting), "accounting": accounting}
        found[entry["id"]] = TableSpec(**{**entry, "columns": columns, "labels": tuple(entry["labels"]), **notes})
    return found


def long(records: Sequence[Record], counts: Mapping[tuple[str, str], float] | None = None) -> pd.DataFrame:
    """One line per number of the paper, with what we measured for it.

    Columns: table, row, column, metric, recipe, paper, ours_mean, ours_std, ours_n, marked, counted, twin, twin_mean,
    twin_std, twin_n. n counts seeds; without a measurement it is 0 and the mean NaN; std is NaN below two seeds.
    counts: (recipe, metric) -> value counted on the network; where nothing was measured it is the mean, of 0 seeds.
    """
    measured = counting(records)
    short = marked(records)
    lines = []
    for cell in cells().itertuples(index=False):
        ours = measured.get((cell.recipe, cell.metric), [])
        twin = measured.get((cell.twin, cell.metric), [])
        counted = None if ours else (counts or {}).get((cell.recipe, cell.metric))
        lines.append(
            {
                "table": cell.table,
                "row": cell.row,
                "column": cell.column,
                "metric": cell.metric,
                "recipe": cell.recipe,
                "paper": float(cell.value),
                **_spread("ours", ours),
                **({} if counted is None else {"ours_mean": counted}),
                "marked": (cell.recipe, cell.metric) in short,
                "counted": counted is not None,
                "twin": cell.twin,
                **_spread("twin", twin),
            }
        )
    return pd.DataFrame(lines)


def table(id: str, records: Sequence[Record]) -> pd.DataFrame:
    """One table in the paper's layout: its label columns, then "<column> paper", "<column> ours", "<column> digits".

    All values are text, with the decimals of the paper's number. "ours" and "digits" columns without any value are
    left out. Raises: BdmError if there is no such table.
    """
    known = specs()
    if id not in known:
        raise unknown("table", id, known)
    return layout(known[id], long(records))


def layout(spec: TableSpec, lines: pd.DataFrame) -> pd.DataFrame:
    """`table` from what `long` gave, which serves all tables."""
    lines = lines.assign(printed=cells()["value"])[lines["table"] == spec.id]
    rows = list(dict.fromkeys(lines["row"]))
    frame = pd.DataFrame([row.split(" | ") for row in rows], columns=list(spec.labels))
    for column in spec.columns:
        found = {line.row: line for line in lines[lines["column"] == column.name].itertuples(index=False)}
        texts = {"paper": [], "ours": [], "digits": []}
        for row in rows:
            for kind, text in zip(texts, _texts(found.get(row)), strict=True):
                texts[kind].append(text)
        _append(frame, column, texts)
    return frame


def _append(frame: pd.DataFrame, column: Column, texts: dict[str, list[str | None]]) -> None:
    """Add a column's kinds to a frame, leaving out ours and digits where they are empty throughout."""
    for kind, values in texts.items():
        if kind == "paper" or any(values):
            frame[f"{column.name} {kind}"] = values


def other(records: Sequence[Record]) -> pd.DataFrame:
    """Every measurement that no table of the paper has a place for: one row per recipe, one column per metric.

    Scores that do not rest on Inception's features and ADM's protocol say so in their column's name.
    """
    known = cells()
    placed = {(name, cell.metric) for cell in known.itertuples() for name in (cell.recipe, cell.twin)}
    short = marked(records)
    rows: dict[str, dict[str, str]] = {}
    for (name, metric), found in sorted(counting(records).items()):
        if (name, metric) not in placed:
            spread = _spread("", found)
            text = _written(spread["_mean"], spread["_std"], spread["_n"])
            ruler = found[-1].ruler
            column = f"{metric} ({ruler})" if ruler else metric
            rows.setdefault(name, {"recipe": name})[column] = text + DAGGER * ((name, metric) in short)
    frame = pd.DataFrame(list(rows.values()), columns=None if rows else ["recipe"])
    return frame.astype(object).where(frame.notna(), None)


class Row(NamedTuple):
    """A row of our choosing. cell: the recipe id (or its twin's) that the paper's number of this row belongs to."""

    label: str
    spec: Recipe
    cell: str


def beside(records: Sequence[Record], ids: Sequence[str], rows: Sequence[Row]) -> pd.DataFrame:
    """Rows of our choosing in the columns of the paper's tables `ids`, which share their columns.

    Ours were measured with exactly this version of the recipe; they stand below "digits" where its data set is the
    digits. The paper's number is that of the first cell which names the row's cell id as its recipe or its twin.
    """
    known, printed = specs(), cells()
    printed = printed[printed["table"].isin(ids)]
    measured = {(row.spec.id, row.spec.digest) for row in rows}
    these = [record for record in records if (record.recipe, record.digest) in measured]
    found, short = counting(these), marked(these)
    frame = pd.DataFrame({"Variant": [row.label for row in rows]})
    for column in known[ids[0]].columns:
        texts: dict[str, list[str | None]] = {kind: [None] * len(rows) for kind in ("paper", "ours", "digits")}
        of_metric = printed[printed["metric"] == column.metric]
        for i, row in enumerate(rows):
            here = of_metric[(of_metric["recipe"] == row.cell) | (of_metric["twin"] == row.cell)]
            texts["paper"][i] = here.iloc[0]["value"] if len(here) else None
            key = (row.spec.id, column.metric)
            spread = _spread("", found.get(key, []))
            text = _written(spread["_mean"], spread["_std"], spread["_n"], decimals=2)
            kind = "digits" if row.spec.data.dataset == "digits" else "ours"
            texts[kind][i] = text + DAGGER * (key in short) or None
        _append(frame, column, texts)
    return frame


def marked(records: Sequence[Record]) -> set[tuple[str, str]]:
    """The (recipe, metric) at the paper's scale that rest on too few images, or on fewer steps than the recipe's file.

    The digits miniature is never marked: it stands in a column of its own.
    """
    known, steps = recipe.names(), {}
    found = set()
    for record in itertools.chain(*counting(records).values()):
        name = record.recipe.partition("+")[0]
        if record.metric in UNTRAINED or name.partition("-")[0] == "digits":
            continue
        if record.metric.startswith("loss_simple@"):
            n_images, n_steps = 0, int(record.metric.removeprefix("loss_simple@"))
        else:
            if name not in steps:
                steps[name] = recipe.load(name).train.steps if name in known else 0
            n_images, n_steps = 0 if record.metric == "time_h" else PAPER_IMAGES, steps[name]
        if (record.n_images or 0) < n_images or record.steps < n_steps:
            found.add((record.recipe, record.metric))
    return found


def counting(records: Sequence[Record]) -> dict[tuple[str, str], list[Record]]:
    """The records that count, one per seed; seeds measured with an older version of the recipe's file do not."""
    found = defaultdict(list)
    for record in newest(list(records)).values():
        found[record.recipe, record.metric].append(record)
    for key, seeds in found.items():
        version = max(seeds, key=lambda record: record.time).digest
        found[key] = [record for record in seeds if record.digest == version]
    return found


def _spread(prefix: str, found: Sequence[Record]) -> dict[str, float | int]:
    values = [record.value for record in found]
    return {
        f"{prefix}_mean": statistics.fmean(values) if values else math.nan,
        f"{prefix}_std": statistics.stdev(values) if len(values) > 1 else math.nan,
        f"{prefix}_n": len(values),
    }


def _texts(line: tuple | None) -> tuple[str | None, str | None, str | None]:
    """Paper's, ours, digits of one line of `long`: None where there is no number."""
    if line is None:
        return None, None, None
    decimals = len(line.printed.partition(".")[2])
    if line.counted:
        return line.printed, f"{line.ours_mean:.{decimals}f}{DOUBLE_DAGGER}", None
    ours = _written(line.ours_mean, line.ours_std, line.ours_n, decimals)
    twin = _written(line.twin_mean, line.twin_std, line.twin_n, decimals)
    return line.printed, ours + DAGGER * line.marked or None, twin or None


def _written(mean: float, std: float, n: int, decimals: int | None = None) -> str:
    """'12.31 ± 0.40 (3)', '12.31 (1)' or ''. Without `decimals`: four significant digits of the mean."""
    if n == 0:
        return ""
    if decimals is None:
        decimals = max(0, 3 - math.floor(math.log10(abs(mean) or 1)))
    return f"{mean:.{decimals}f} ± {std:.{decimals}f} ({n})" if n > 1 else f"{mean:.{decimals}f} (1)"
