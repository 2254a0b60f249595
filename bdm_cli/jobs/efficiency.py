"""Model size and operations of the recipes' networks (Eqs. 16-17), beside the papers' numbers."""

import math
import re

import pandas as pd

from bdm_cli import recipe as recipes
from bdm_cli.diffusion.models import build_unet
from bdm_cli.errors import BdmError, unknown
from bdm_cli.metrics import cost
from bdm_cli.metrics.cost import FP_BITS, GIGA, Bits, NetworkCost, Part, Structure
from bdm_cli.output import Format
from bdm_cli.paper import tables
from bdm_cli.quant.swap import Site
from bdm_cli.recipe import Recipe

ALL_BITS = ("32/32", "8/8", "4/32", "4/8", "4/4", "2/32", "2/8", "2/4", "1/32", "1/8", "1/4", "1/1")
"""The bit-widths of the papers' tables."""

EDGES = {"8": (8,), "32": (32,), "both": (8, 32)}
MINIATURE = "digits"

Printed = dict[tuple[str, str], dict[str, float]]
"""(bits, structure) -> metric -> the paper's number."""


def run(
    bits: str | None = None,
    model: str | None = None,
    edges: str | None = None,
    structure: str | None = None,
    scales: str = "paper",
    attention: bool = False,
) -> tuple[pd.DataFrame, list[str]]:
    """Full precision, then one row per bits, structure and edge bits; and the notes on the papers' numbers there.

    bits: "W/A", weight and activation bits; None: all of the papers' tables that suit the structure.
    model: a recipe's unet.name; None: the networks of the paper, not the miniatures.
    edges: bits of the layers next to input and output, a key of EDGES; None: both.
    structure: one of cost.STRUCTURES; None: plain, and beside it those that the papers print.
    scales, attention: as cost.bill; the papers leave the attentions' products out.
    Savings are against full precision. Raises: BdmError for what does not exist.
    """
    _check(structure, scales)
    chosen = [parse_bits(bits)] if bits is not None else [parse_bits(text) for text in ALL_BITS]
    sides = _edges(edges or "both")
    if bits is not None and structure is not None:
        _check_fit(structure, *chosen[0])
    rows, told = [], set()
    for name, found in _models(model).items():
        network = cost.of_unet(found[0].unet, build_unet)
        printed, in_tables = _printed(found)
        choices = [(Bits(), "plain")]
        for weight, activation in chosen:
            beside = [form for text, form in printed if text == f"{weight}/{activation}"]
            for form in [structure] if structure else dict.fromkeys(["plain", *beside]):
                if weight < FP_BITS and _fits(form, weight, activation):
                    choices += [(Bits(weight, activation, edge), form) for edge in sides]
        full = cost.total(cost.bill(network, Bits(), attention=attention))
        for choice, form in choices:
            parts = cost.bill(network, choice, _structure(form, found), scales, attention)
            counted = cost.metrics(cost.total(parts), full)
            key = (str(choice), form)
            told |= set(in_tables.get(key, ()))
            row = _row(name, form, choice, counted, printed.get(key, {}))
            rows.append(row | {"Paper's tables": ", ".join(in_tables.get(key, ()))})
    specs = tables.specs()
    notes = [f"Table {id}: {note}" for id, spec in specs.items() if id in told for note in spec.accounting]
    return pd.DataFrame(rows), notes


def parts(
    by: str,
    bits: str | None,
    model: str | None,
    edges: str | None = None,
    structure: str | None = None,
    scales: str = "paper",
    attention: bool = False,
) -> pd.DataFrame:
    """One network at one choice of bits, taken apart: one row per layer or per timestep block, then their sum.

    by: "layer" or "block". edges: 8 or 32; None: 8, as the paper's text says. The rest as in `run`.
    Raises: BdmError for what does not exist, and without model and bits.
    """
    known = models()
    if model is None or bits is None:
        raise BdmError(
            f"--by-{by} takes one network at one choice of bits apart.\n  name both, e.g. "
            f"--model {model or next(iter(known))} --bits {bits or '1/4'}; networks: {', '.join(known)}"
        )
    form = structure or "plain"
    _check(form, scales)
    weight, activation = parse_bits(bits)
    _check_fit(form, weight, activation)
    if edges == "both":
        raise BdmError(f"--by-{by} shows one choice of --edges.\n  allowed: 8 or 32")
    (edge,) = _edges(edges or "8")
    choice = Bits() if weight == activation == FP_BITS else Bits(weight, activation, edge)
    (found,) = _models(model).values()
    network, kind = cost.of_unet(found[0].unet, build_unet), _structure(form, found)
    rows = cost.bill(network, choice, kind, scales, attention)
    table = _by_layer(network, rows, kind.scope) if by == "layer" else _by_block(network, rows, kind.scope)
    for what in ("Size (MiB)", "OPs (G)"):
        table.insert(len(table.columns), f"{what.split()[0]} share (%)", 100 * table[what] / table[what].sum())
    whole = {"Block": "", **{name: table[name].sum() for name in table.select_dtypes("number").columns}}
    table = pd.concat([table, pd.DataFrame([{**whole, table.columns[0]: "total"}])], ignore_index=True)
    return table.round(dict.fromkeys(table.select_dtypes("number").columns, 6))


def sheets(table: pd.DataFrame, form: Format) -> list[tuple[str, pd.DataFrame]]:
    """What `run` gave, as (title, table) to print: every column for programs, the main ones for people.

    For people, "%" is the difference from the paper's number beside it and "x" the saving against full precision,
    with the paper's in brackets where it prints one. On a terminal there is one table per network.
    """
    if form in (Format.json, Format.csv):
        return [("", table)]
    plain = table["Structure"] == "plain"
    short = pd.DataFrame(
        {
            "Model": table["Model"],
            "W/A": table["W/A"].where(plain, table["W/A"] + " " + table["Structure"]),
            "Edges": table["Edges"],
            "Size MiB": table["Size (MiB)"],
            "Paper MB": table["Paper: Size (MB)"],
            "Size %": table["Size difference (%)"].map(_signed),
            "OPs G": table["OPs (G)"],
            "Paper G": table["Paper: OPs (G)"],
            "OPs %": table["OPs difference (%)"].map(_signed),
            "Size x": _with_paper(table, "Size saving"),
            "OPs x": _with_paper(table, "OPs saving"),
        }
    )
    if form != Format.table:
        return [("", short.map(lambda value: "" if pd.isna(value) else str(value)))]
    return [
        (f"{name}: size and operations", part.drop(columns="Model").dropna(axis="columns", how="all"))
        for name, part in short.groupby("Model", sort=False)
    ]


def _signed(difference: float | None) -> str | float:
    return math.nan if pd.isna(difference) else f"{difference:+.1f}"


def _with_paper(table: pd.DataFrame, what: str) -> list[str]:
    pairs = zip(table[what], table[f"Paper: {what}"], strict=True)
    return [f"{ours}" if pd.isna(theirs) else f"{ours} ({theirs})" for ours, theirs in pairs]


def narrow(table: pd.DataFrame, form: Format) -> pd.DataFrame:
    """What `parts` gave, as a terminal of 120 columns can show it; unchanged in the other forms."""
    if form != Format.table:
        return table
    texts = table.select_dtypes(exclude="number").fillna("").replace("^(down|up)_blocks", r"\1", regex=True)
    where = (texts["Block"] + " " + texts["Region"]).str.strip()
    if "Layer" in table:
        found = {"Layer": texts["Layer"], "Where": where, "Shape": texts["Shape"], "W/A": texts["W/A"]}
        unit, per_giga, size, per_mib = "M", 1e3, "KiB", 1024
    else:
        found = {"Block": where, "Modules": texts["Modules"]}
        unit, per_giga, size, per_mib = "G", 1, "MiB", 1
    found[f"MACs {unit}"] = (table["MACs (G)"] * per_giga).round(3)
    found[size] = (table["Size (MiB)"] * per_mib).round(2)
    found[f"OPs {unit}"] = (table["OPs (G)"] * per_giga).round(3)
    found |= {f"{what} %": table[f"{what} share (%)"].round(2) for what in ("Size", "OPs")}
    return pd.DataFrame(found)


def parse_bits(text: str) -> tuple[int, int]:
    """'1/4' -> (1, 4). Raises: BdmError unless both are 1..8 or 32."""
    found = re.fullmatch(r"(\d{1,2})/(\d{1,2})", text.strip())
    bits = tuple(int(part) for part in found.groups()) if found else ()
    if not bits or not all(b == 32 or 1 <= b <= 8 for b in bits):
        raise BdmError(
            f"cannot read --bits '{text}'.\n"
            "  allowed: weight bits / activation bits, each 1..8, or 32 for full precision; e.g. --bits 1/4"
        )
    return bits


def models() -> dict[str, list[Recipe]]:
    """The networks of all recipes, by unet.name: the paper's, then the miniatures'."""
    found: dict[str, list[Recipe]] = {}
    for name in recipes.names():
        recipe = recipes.load(name)
        found.setdefault(recipe.unet.name, []).append(recipe)
    return dict(sorted(found.items(), key=lambda item: (_miniature(item[1]), item[0])))


def _miniature(found: list[Recipe]) -> bool:
    return found[0].data.dataset == MINIATURE


def _models(model: str | None) -> dict[str, list[Recipe]]:
    known = models()
    if model is None:
        return {name: found for name, found in known.items() if not _miniature(found)}
    if model not in known:
        raise unknown("model", model, known, "a model is what a recipe's unet.name says")
    return {model: known[model]}


def _edges(text: str) -> tuple[int, ...]:
    if text not in EDGES:
        raise unknown("--edges", text, EDGES, "bits of the layers next to input and output")
    return EDGES[text]


def _check(structure: str | None, scales: str) -> None:
    if structure is not None and structure not in cost.STRUCTURES:
        raise unknown("--structure", structure, cost.STRUCTURES)
    if scales not in cost.SCALES:
        raise unknown("--scales", scales, cost.SCALES)


def _fits(structure: str, weight: int, activation: int) -> bool:
    """Whether a structure is for these bits."""
    needed = cost.STRUCTURES[structure] or (None, None)
    return all(n in (None, b) for n, b in zip(needed, (weight, activation), strict=True))


def _check_fit(structure: str, weight: int, activation: int) -> None:
    if not _fits(structure, weight, activation):
        needed = "/".join("any" if n is None else str(n) for n in cost.STRUCTURES[structure])
        raise BdmError(f"--structure {structure} is not for --bits {weight}/{activation}.\n  its bits: {needed}")


def _structure(name: str, found: list[Recipe]) -> Structure:
    """With the network's own scope of two bases; BiDM connects the last 8 blocks of latent models, 2 of others."""
    scopes = [recipe.method["ebb_scope"] for recipe in found if "ebb_scope" in recipe.method]
    return Structure(name, scope=max(scopes, default=6), connections=8 if found[0].first_stage else 2)


def _printed(found: list[Recipe]) -> tuple[Printed, dict[tuple[str, str], dict[str, None]]]:
    """The papers' numbers for networks of these recipes' data sets, and the tables that have them."""
    datasets = {recipe.data.dataset for recipe in found}
    printed, in_tables = {}, {}
    for cell in tables.cells().itertuples():
        if cell.metric in tables.COUNTED and cell.recipe:
            dataset, (weight, activation), structure = cost.parse_recipe(cell.recipe)
            if dataset in datasets and structure:
                for form in (structure, "bidm-paper") if structure == "bidm" else (structure,):
                    key = (f"{weight}/{activation}", form)
                    printed.setdefault(key, {}).setdefault(cell.metric, float(cell.value))
                    in_tables.setdefault(key, {})[cell.table] = None
    return printed, in_tables


def _row(name: str, form: str, bits: Bits, counted: dict[str, float], paper: dict[str, float]) -> dict[str, object]:
    def difference(metric: str) -> float | None:
        return round(100 * (counted[metric] / paper[metric] - 1), 2) if metric in paper else None

    return {
        "Model": name,
        "Structure": form,
        "W/A": str(bits),
        "Edges": bits.edge,
        "Size (MiB)": round(counted["size_mb"], 2),
        "Paper: Size (MB)": paper.get("size_mb"),
        "Size difference (%)": difference("size_mb"),
        "BOPs (G)": round(counted["bops_g"], 3),
        "Paper: BOPs (G)": paper.get("bops_g"),
        "FLOPs (G)": round(counted["flops_g"], 3),
        "Paper: FLOPs (G)": paper.get("flops_g"),
        "OPs (G)": round(counted["ops_g"], 3),
        "Paper: OPs (G)": paper.get("ops_g"),
        "OPs difference (%)": difference("ops_g"),
        "Size saving": round(counted["size_saving"], 1),
        "Paper: Size saving": paper.get("size_saving"),
        "OPs saving": round(counted["ops_saving"], 1),
        "Paper: OPs saving": paper.get("ops_saving"),
    }


def _numbers(found: list[Part]) -> dict[str, float]:
    whole = cost.total(found)
    return {
        "MACs (G)": sum(part.macs for part in found) / GIGA,
        "Size (MiB)": whole.size_mb,
        "BOPs (G)": whole.bops / GIGA,
        "FLOPs (G)": whole.flops / GIGA,
        "OPs (G)": whole.ops / GIGA,
    }


def _region(network: NetworkCost, name: str, block: int | None, scope: int) -> str:
    site = Site(name, block, len(network.blocks))
    return "outside" if block is None and not site.edge else site.region(scope)


def _by_layer(network: NetworkCost, found: list[Part], scope: int) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "Layer": part.name,
                "Block": "" if part.block is None else str(part.block),
                "Region": _region(network, part.name, part.block, scope),
                "Kind": part.kind,
                "Shape": "x".join(map(str, part.shape)),
                "W/A": "/".join(map(str, part.bits or ())),
                **_numbers([part]),
            }
            for part in found
        ]
    )


def _by_block(network: NetworkCost, found: list[Part], scope: int) -> pd.DataFrame:
    rows = []
    for index, modules in [*((b.index, b.modules) for b in network.blocks), (None, ("time embedding, output",))]:
        inside = [part for part in found if part.block == index]
        path = modules[0].rpartition(".resnets")[0]
        names = [name.removeprefix(f"{path}.") for name in modules]
        rows.append(
            {
                "Block": "outside" if index is None else str(index),
                "Modules": f"{path}: {', '.join(names)}" if path else ", ".join(names),
                "Region": "" if index is None else _region(network, "", index, scope),
                "Layers": sum(part.bits is not None for part in inside),
                **_numbers(inside),
            }
        )
    return pd.DataFrame(rows)
