"""bdm report: records and runs -> results/tables/*.md and *.csv, and results/report.html, one self-contained page."""

import base64
import io
import itertools
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import jinja2
import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image

from bdm_cli import output, recipe, records, runs
from bdm_cli.diffusion.models import build_unet
from bdm_cli.errors import unknown
from bdm_cli.methods import outline
from bdm_cli.metrics import cost
from bdm_cli.paper import tables
from bdm_cli.records import Record

OTHER = "other"
OTHER_LEGEND = "Measurements that no table of the paper has a place for."

COMPONENT_TABLES = ("7", "4")
"""The ablations of EBB and LRM, at W1A4 and W1A32: the paper's claim is that FID falls from row to row."""

GRID_PX, PLOT_PX = 480, 1000
"""Widths that embedded sample grids and plots are scaled down to."""

COLOURS = {"fp": "#8b919a", "baseline": "#e08a2c", "ebb": "#2f9e77", "binarydm": "#4477dd"}
MORE_COLOURS = (
    *("#a05fc0", "#d0557f", "#27a5b5", "#b0941f", "#8a6d4b", "#7d8fe0", "#5f9e2f", "#c9655a"),
    *("#5b7f95", "#cf79c2", "#9a9a3a", "#3f8f8f", "#b5763c", "#7a63b8", "#6f7782"),
)
PLAIN_COLOUR = "#6f7782"
DASHES = ("-", "--", ":", "-.")
LIGHT = {"ink": "#23262b", "soft": "#6a707a", "line": "#d9dce1"}
DARK = {"ink": "#e4e6ea", "soft": "#9aa1ab", "line": "#3a3f47"}


def run(table: str | None = None) -> pd.DataFrame:
    """Write all tables and the page; return the table with this id, or an overview of all tables.

    Raises: BdmError if there is no such table.
    """
    specs = tables.specs()
    if table is not None and table not in (*specs, OTHER):
        raise unknown("table", table, (*specs, OTHER))
    measured = records.read()
    long = tables.long(measured, counts())
    frames = {id: tables.layout(spec, long) for id, spec in specs.items()}
    other = tables.other(measured)
    for id, spec in specs.items():
        _write(id, _markdown(spec, frames[id]), long[long["table"] == id])
    if len(other):
        _write(OTHER, f"# Other runs\n\n{OTHER_LEGEND}\n\n{_md(other)}\n", other)
    page = runs.tables_dir().parent / "report.html"
    runs.write_text(page, _html(measured, long, specs, frames, other))
    if outdated := _outdated(measured):
        output.say(f"note: changed since they were measured: {', '.join(outdated)}")
    output.say(f"wrote {page}, and {len(specs)} tables below {runs.tables_dir()}")
    if table is not None:
        return other if table == OTHER else frames[table]
    return _overview(specs, long)


def counts() -> dict[tuple[str, str], float]:
    """Sizes and operations of the recipes that the tables name: (recipe, metric) -> value, for tables.long."""
    cells = tables.cells()
    asked = set(cells[cells["metric"].isin(tables.COUNTED)]["recipe"]) - {""}
    return {
        (name, metric): value
        for name in sorted(asked)
        for metric, value in cost.of_recipe(name, build_unet, outline).items()
    }


def _write(id: str, markdown: str, lines: pd.DataFrame) -> None:
    runs.write_text(runs.tables_dir() / f"table-{id}.md", markdown)
    runs.write_text(runs.tables_dir() / f"table-{id}.csv", lines.to_csv(index=False))


def _md(frame: pd.DataFrame) -> str:
    return frame.fillna("").to_markdown(index=False, disable_numparse=True)


def _markdown(spec: tables.TableSpec, frame: pd.DataFrame) -> str:
    notes = [f"- {note}" for note in spec.notes]
    parts = [f"# Table {spec.id}. {spec.title}", f"Source of the paper's numbers: {spec.source}", _md(frame)]
    parts += [f"Columns {tables.OURS_LEGEND}", f"Columns {tables.DIGITS_LEGEND}"]
    parts += ["Notes on the paper's table:\n\n" + "\n".join(notes)] if notes else []
    return "\n\n".join(parts) + "\n"


def _overview(specs: dict[str, tables.TableSpec], long: pd.DataFrame) -> pd.DataFrame:
    """Per table: how many of its numbers the paper gives, and how many we measured at each scale or counted."""
    lines = []
    for id, spec in specs.items():
        part = long[long["table"] == id]
        ours, digits = int((part["ours_n"] > 0).sum()), int((part["twin_n"] > 0).sum())
        found = {"paper": len(part), "ours": ours, "digits": digits, "counted": int(part["counted"].sum())}
        lines.append({"table": id, "title": spec.title, **found})
    return pd.DataFrame(lines)


# ---- names of recipes ------------------------------------------------------------------------------------------------


class Name(NamedTuple):
    """A recipe's id, taken apart: 'digits-w1a4-ebb+method.tau=0' is digits, w1a4, ebb, '+method.tau=0'."""

    dataset: str
    bits: str
    method: str
    overrides: str

    @property
    def group(self) -> str:
        return "-".join(part for part in (self.dataset, self.bits) if part)

    @property
    def variant(self) -> str:
        """What distinguishes recipes of one group, for legends."""
        return self.method + re.sub(r"\+(method|train|sample)\.", "\n+", self.overrides)


def _name(recipe_id: str) -> Name:
    base, plus, overrides = recipe_id.partition("+")
    match = re.fullmatch(r"([\w-]+?)-(fp|w\d+a\d+)(?:-(.+))?", base)
    if not match:
        return Name(base, "", base, plus + overrides)
    dataset, bits, method = match.groups()
    return Name(dataset, bits, method or ("fp" if bits == "fp" else "binarydm"), plus + overrides)


def _colours() -> dict[str, str]:
    """One colour per method, the same in every plot: those of the paper's tables, in their order."""
    ids = tables.cells()["recipe"]
    methods = dict.fromkeys(_name(id).method for id in ids if id)
    rest = [method for method in methods if method not in COLOURS]
    return COLOURS | {method: MORE_COLOURS[i % len(MORE_COLOURS)] for i, method in enumerate(rest)}


def _order(recipe_id: str) -> tuple:
    """Sort key: by data set, full precision first, then by bits and method in the papers' order."""
    name = _name(recipe_id)
    methods = list(_colours())
    place = methods.index(name.method) if name.method in methods else len(methods)
    bits = [int(number) for number in re.findall(r"\d+", name.bits)]
    return name.dataset, name.bits != "fp", bits, place, name.method, name.overrides


# ---- pictures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """An image inside the page; `dark` is its version for a dark page, if there is one."""

    light: str
    alt: str
    caption: str = ""
    dark: str = ""


def _plot(draw: Callable[[Axes, dict], None], alt: str, height: float = 3.0) -> Picture:
    """The same drawing for the light and the dark page. Sized so that a phone shows it without shrinking the text."""
    images = []
    for theme in (LIGHT, DARK):
        style = {
            "font.size": 9,
            "axes.titlesize": 10,
            "axes.titlelocation": "left",
            "axes.titleweight": "bold",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
            "axes.edgecolor": theme["line"],
            "grid.color": theme["line"],
            "legend.frameon": False,
            "legend.fontsize": 8,
            **dict.fromkeys(("text.color", "axes.titlecolor"), theme["ink"]),
            **dict.fromkeys(("axes.labelcolor", "xtick.color", "ytick.color"), theme["soft"]),
            **dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor"), theme["ink"]),
        }
        with matplotlib.rc_context(style):
            figure = Figure(figsize=(4.6, height), layout="constrained")
            draw(figure.subplots(), theme)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=180, transparent=True, metadata={"Software": None})
        images.append(_data_uri(buffer.getvalue()))
    return Picture(light=images[0], dark=images[1], alt=alt)


def _file(path: Path, width: int, caption: str) -> Picture:
    """A PNG of a run, scaled down to `width`."""
    with Image.open(path) as image:
        if image.width > width:
            image = image.convert("RGB" if image.mode == "P" else image.mode)
            image = image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, format="png", optimize=True)
    return Picture(light=_data_uri(buffer.getvalue()), alt=caption, caption=caption)


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _points(axes: Axes, theme: dict, y: float, values: Sequence[float], colour: str) -> None:
    """One row of a point plot: seeds as dots, their mean as a tick, their standard deviation as a bar."""
    mean = statistics.fmean(values)
    if len(values) > 1:
        spread = statistics.stdev(values)
        axes.plot([mean - spread, mean + spread], [y, y], color=colour, lw=5, alpha=0.3, solid_capstyle="round")
    axes.plot(values, [y] * len(values), "o", color=colour, ms=4, alpha=0.55, mew=0)
    axes.plot([mean], [y], "|", color=colour, ms=13, mew=2.4)
    axes.annotate(
        f"{mean:.4g}", (mean, y), (0, 9), textcoords="offset points", ha="center", fontsize=8, color=theme["ink"]
    )


# ---- what the page shows ---------------------------------------------------------------------------------------------


def _component_plots(long: pd.DataFrame, measured: Sequence[Record], colours: dict[str, str]) -> list[Picture]:
    """FID by row of the component tables: on the digits, at the paper's scale, and the paper's own."""
    fids = _fids(measured)
    plots = []
    for id in COMPONENT_TABLES:
        part = long[(long["table"] == id) & (long["metric"] == "fid")]
        labels = [row.split(" | ")[0] for row in part["row"]]
        shades = [colours[_name(name).method] for name in part["recipe"]]
        digits = [fids.get(name, []) for name in part["twin"]]
        ours = [fids.get(name, []) for name in part["recipe"]]
        if any(digits):
            plots.append(_point_plot(f"Table {id} on the digits miniature", labels, digits, shades))
        if any(ours):
            marks = [row + tables.DAGGER * short for row, short in zip(labels, part["marked"], strict=True)]
            plots.append(_point_plot(f"Table {id} at the paper's scale, ours", marks, ours, shades))
        if any(digits) or any(ours):
            paper = [[value] for value in part["paper"]]
            plots.append(_point_plot(f"Table {id}, the paper's own numbers", labels, paper, shades))
    return plots


def _plain_numbers(axis: Axis) -> None:
    """Write 1, 2, 5, 10, ... on a log scale."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _point_plot(title: str, labels: Sequence[str], rows: Sequence[list[float]], shades: Sequence[str]) -> Picture:
    """FIDs of several recipes, one row each; on a log scale where they span more than a factor of ten."""
    means = [statistics.fmean(values) for values in rows if values]
    log = min(means) > 0 and max(means) > 10 * min(means)

    def draw(axes: Axes, theme: dict) -> None:
        axes.set(title=title, xlabel="FID (lower is better)" + log * ", log scale")
        for y, (values, shade) in enumerate(zip(rows, shades, strict=True)):
            if values:
                _points(axes, theme, y, values, shade)
        if log:
            axes.set_xscale("log")
            _plain_numbers(axes.xaxis)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.5, -0.7)
        axes.grid(axis="x", lw=0.7)
        axes.tick_params(length=0)
        axes.margins(x=0.12)

    lines = sum(1 + 0.6 * label.count("\n") for label in labels)
    return _plot(draw, f"{title}: FID", height=1.0 + 0.4 * lines)


def _fids(measured: Sequence[Record]) -> dict[str, list[float]]:
    """FIDs that count, by recipe, one per seed."""
    found = tables.counting(measured)
    return {name: [record.value for record in seeds] for (name, metric), seeds in found.items() if metric == "fid"}


def verdicts(long: pd.DataFrame) -> pd.DataFrame:
    """Does FID move from row to row of the component tables as the paper says?

    A change counts when it is larger than two standard errors, sqrt(s_a^2 / n_a + s_b^2 / n_b), over the seeds.
    """
    lines = []
    for id in COMPONENT_TABLES:
        part = long[(long["table"] == id) & (long["metric"] == "fid")]
        rows = list(part.itertuples(index=False))[1:]  # the first is full precision
        for a, b in [*itertools.pairwise(rows), (rows[0], rows[-1])]:
            for scale, prefix in (("digits", "twin"), ("paper's", "ours")):
                means, stds, ns = (
                    [getattr(row, f"{prefix}_{what}") for row in (a, b)] for what in ("mean", "std", "n")
                )
                marked = prefix == "ours" and (a.marked or b.marked)
                if all(ns):
                    lines.append(
                        {
                            "Table": id,
                            "#Bits": a.row.split(" | ")[1],
                            "Step": f"{a.row.split(' | ')[0]} → {b.row.split(' | ')[0]}",
                            "Verdict": _verdict(b.paper - a.paper, means, stds, ns),
                            "Paper's FID": f"{a.paper:.2f} → {b.paper:.2f}",
                            "Our FID": f"{means[0]:.2f} → {means[1]:.2f}" + tables.DAGGER * marked,
                            "Our scale": scale,
                            "Seeds": " / ".join(str(n) for n in ns),
                        }
                    )
    return pd.DataFrame(lines)


def _verdict(paper_change: float, means: Sequence[float], stds: Sequence[float], ns: Sequence[int]) -> str:
    change = means[1] - means[0]
    same = change * paper_change > 0
    if min(ns) < 2:
        return f"{'same' if same else 'opposite'} direction, too few seeds to tell"
    error = math.sqrt(sum(std**2 / n for std, n in zip(stds, ns, strict=True)))
    if abs(change) <= 2 * error:
        return "no difference beyond the seeds' spread"
    return "as the paper says" if same else "contradicts the paper"


def _loss_plots(run_ids: Sequence[str], colours: dict[str, str]) -> list[Picture]:
    """Noise loss over training steps, one plot per data set and bits; runs that logged none are left out."""
    groups: dict[str, dict[str, list[tuple[np.ndarray, np.ndarray]]]] = defaultdict(lambda: defaultdict(list))
    for run_id in run_ids:
        lines = runs.read_lines(runs.metrics_log(run_id))
        key = "loss_simple" if lines and "loss_simple" in lines[0] else "loss"
        points = [(line["step"], line[key]) for line in lines if key in line]
        if len(points) > 1:
            steps, losses = (np.array(column, float) for column in zip(*points, strict=True))
            recipe_id = _run_parts(run_id)[0]
            groups[_name(recipe_id).group][recipe_id].append(_smooth(steps, losses))
    plots = []
    for group, curves in sorted(groups.items()):

        def draw(axes: Axes, theme: dict, group: str = group, curves: dict = curves) -> None:
            used: dict[str, int] = defaultdict(int)
            for recipe_id in sorted(curves, key=_order):
                name = _name(recipe_id)
                dash = DASHES[used[name.method] % len(DASHES)]
                used[name.method] += 1
                for i, (steps, losses) in enumerate(curves[recipe_id]):
                    label = name.variant.replace("\n", " ") if i == 0 else None
                    colour = colours.get(name.method, PLAIN_COLOUR)
                    axes.plot(steps, losses, dash, color=colour, lw=1.3 if len(curves) < 5 else 0.9, label=label)
            axes.set(title=group, xlabel="training step", ylabel="noise loss", yscale="log")
            _plain_numbers(axes.yaxis)
            axes.grid(lw=0.7)
            axes.legend(loc="upper left", bbox_to_anchor=(0, -0.2), ncols=2, borderpad=0)

        plots.append(_plot(draw, f"noise loss over training steps, {group}", height=2.9 + 0.1 * len(curves)))
    return plots


def _smooth(steps: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Running mean over a fiftieth of the log, thinned to at most 400 points."""
    width = max(1, len(losses) // 50)
    kernel = np.full(width, 1 / width)
    every = max(1, len(losses) // 400)
    return steps[width - 1 :][::every], np.convolve(losses, kernel, mode="valid")[::every]


def _fid_plots(measured: Sequence[Record], colours: dict[str, str]) -> list[Picture]:
    """FID of every recipe that has one, one plot per data set."""
    fids, short = _fids(measured), tables.marked(measured)
    plots = []
    for dataset in sorted({_name(recipe_id).dataset for recipe_id in fids}):
        order = sorted((id for id in fids if _name(id).dataset == dataset), key=_order)
        names = [_name(id) for id in order]
        labels = [name.variant if name.bits in ("", "fp") else f"{name.bits} {name.variant}" for name in names]
        labels = [label + tables.DAGGER * ((id, "fid") in short) for id, label in zip(order, labels, strict=True)]
        shades = [colours.get(name.method, PLAIN_COLOUR) for name in names]
        title = f"{dataset} miniature" if dataset.startswith("digits") else f"{dataset}, ours"
        plots.append(_point_plot(title, labels, [fids[id] for id in order], shades))
    return plots


def _grids(measured: Sequence[Record]) -> tuple[list[Picture], list[Picture]]:
    """Every sample grid below runs/, with the FIDs recorded for its run: each recipe's first seed, and the others."""
    fids = defaultdict(list)
    for record in records.newest(list(measured)).values():
        if record.metric == "fid":
            sampler = re.search(r"\+sample\.sampler=([\w-]+)", record.recipe)
            told = f"FID {record.value:.4g}" + f" ({record.ruler})" * bool(record.ruler)
            fids[record.run, sampler[1] if sampler else "ddim"].append(told)
    paths = runs.runs_dir().glob("*/samples/*/grid.png")
    found = [(*_run_parts(path.parents[2].name), path.parent.name, path) for path in paths]
    found.sort(key=lambda item: (_order(item[0]), item[2], int(item[1] or 0)))
    first, others, shown = [], [], set()
    for recipe_id, seed, key, path in found:
        seeds = [f"seed {seed}"] if seed else []
        sampler = re.match(r"[a-z-]+", key)
        found_fids = fids[path.parents[2].name, sampler[0] if sampler else ""]
        picture = _file(path, GRID_PX, " · ".join([recipe_id, *seeds, key, *found_fids]))
        (others if (recipe_id, key) in shown else first).append(picture)
        shown.add((recipe_id, key))
    return first, others


def _run_plots() -> list[Picture]:
    """What runs drew themselves, such as weight histograms."""
    paths = sorted(runs.runs_dir().glob("*/plots/*.png"))
    return [_file(path, PLOT_PX, f"{path.parents[1].name} · {path.stem}") for path in paths]


def _run_parts(run_id: str) -> tuple[str, str]:
    """Recipe and seed of a run id; the seed is '' if it names none."""
    match = re.fullmatch(r"(.+)-s(\d+)", run_id)
    return (match[1], match[2]) if match else (run_id, "")


def _environments(measured: Sequence[Record]) -> dict[tuple, str]:
    """A letter for every distinct (commit, versions, machine, device) that records were made with."""
    distinct = dict.fromkeys(_environment(record) for record in measured)
    return {environment: _letters(i) for i, environment in enumerate(distinct)}


def _environment(record: Record) -> tuple:
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    return record.commit, versions, record.machine, record.device


def _letters(i: int) -> str:
    return (_letters(i // 26 - 1) if i >= 26 else "") + chr(ord("A") + i % 26)


def _run_table(run_ids: Iterable[str], measured: Sequence[Record]) -> pd.DataFrame:
    """One row per run: its seed and budget, and what was measured on it, when and where."""
    by_run = defaultdict(list)
    for record in measured:
        by_run[record.run].append(record)
    letters = _environments(measured)
    lines = []
    for run_id in sorted({*run_ids, *by_run}, key=lambda id: (_order(_run_parts(id)[0]), id)):
        found = by_run[run_id]
        log = runs.read_lines(runs.metrics_log(run_id))
        seed = _run_parts(run_id)[1]
        lines.append(
            {
                "Run": run_id,
                "Seed": found[-1].seed if found else seed,
                "Training steps": max([r.steps for r in found] + [line["step"] for line in log[-1:]], default=""),
                "Batch": _batch(run_id),
                "Training time (s)": f"{log[-1]['wall_s']:.0f}" if log and "wall_s" in log[-1] else "",
                "Images": max((r.n_images or 0 for r in found), default=0) or "",
                "Measured": ", ".join(dict.fromkeys(r.metric for r in found)) or "nothing yet",
                "By": "; ".join(dict.fromkeys(r.ruler or r.features for r in found if r.features)),
                "Date (UTC)": max((r.time for r in found), default="")[:10],
                "Made with": ", ".join(dict.fromkeys(letters[_environment(r)] for r in found)),
            }
        )
    return pd.DataFrame(lines)


def _outdated(measured: Sequence[Record]) -> list[str]:
    """Recipes whose file has changed since they were measured. Only ids without overrides can be looked up."""
    known = recipe.names()
    found = {
        name: seeds[0].digest
        for (name, metric), seeds in tables.counting(measured).items()
        if name in known and not metric.startswith("loss_simple@")
    }
    return [name for name, digest in found.items() if recipe.load(name).digest != digest]


def _batch(run_id: str) -> int | str:
    """The training batch of a run; '' if its directory is not here. Raises: BdmError for an unreadable recipe."""
    return runs.stored_recipe(run_id).train.batch if runs.recipe_copy(run_id).exists() else ""


# ---- the page --------------------------------------------------------------------------------------------------------


def _html(
    measured: list[Record],
    long: pd.DataFrame,
    specs: dict[str, tables.TableSpec],
    frames: dict[str, pd.DataFrame],
    other: pd.DataFrame,
) -> str:
    run_ids = sorted(path.parent.name for path in runs.runs_dir().glob("*/recipe.json"))
    colours = _colours()
    overview = _overview(specs, long)
    filled = set(overview["table"][overview[["ours", "digits", "counted"]].sum(axis=1) > 0])
    page = (resources.files("bdm_cli") / "jobs" / "report.html.jinja").read_text(encoding="utf-8")
    options = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    environment = jinja2.Environment(**options)
    environment.tests["missing"] = lambda value: value is None or value != value
    return environment.from_string(page).render(
        empty=not measured and not run_ids,
        facts={
            "measurements": len(measured),
            "runs": len({*run_ids, *(record.run for record in measured)}),
            "recipes": len({record.recipe for record in measured}),
            "seeds": len({record.seed for record in measured}),
            "numbers in the paper's tables": len(long),
            "measured at its scale": int(overview["ours"].sum()),
            "measured on the digits": int(overview["digits"].sum()),
            "counted on the network": int(overview["counted"].sum()),
        },
        newest=max((record.time for record in measured), default=""),
        verdicts=verdicts(long),
        components=_component_plots(long, measured, colours),
        losses=_loss_plots(run_ids, colours),
        fids=_fid_plots(measured, colours),
        grids=_grids(measured),
        run_plots=_run_plots(),
        tables=[(spec, frames[id], _heads(spec, frames[id]), id in filled) for id, spec in specs.items()],
        other=other,
        other_legend=OTHER_LEGEND,
        outdated=_outdated(measured),
        run_table=_run_table(run_ids, measured),
        environments=[(letter, *environment) for environment, letter in _environments(measured).items()],
        legends=(tables.OURS_LEGEND, tables.DIGITS_LEGEND),
    )


def _heads(spec: tables.TableSpec, frame: pd.DataFrame) -> list[tuple[str, str, list[str]]]:
    """For each value column: its name, an arrow to the better side, and which of paper, ours, digits stand below it."""
    arrows = {"lower": "↓", "higher": "↑", "": ""}
    kinds = ("paper", "ours", "digits")
    return [
        (column.name, arrows[column.better], [kind for kind in kinds if f"{column.name} {kind}" in frame.columns])
        for column in spec.columns
    ]
