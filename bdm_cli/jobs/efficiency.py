"""Model size and operations of the recipes' networks (Eqs. 16-17), beside the papers' numbers."""

import functools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from bdm_cli import methods
from bdm_cli import recipe as recipes
from bdm_cli.diffusion.models import build_unet
from bdm_cli.errors import BdmError, unknown
from bdm_cli.metrics import cost
from bdm_cli.metrics.cost import FP_BITS, GIGA, Bits, NetworkCost, Part, Structure
from bdm_cli.output import Format
from bdm_cli.paper import tables
from bdm_cli.quant.swap import Site
from bdm_cli.recipe import Recipe

ALL = "all"
"""In place of methods' names."""

ALL_BITS = ("32/32", "8/8", "4/32", "4/8", "4/4", "2/32", "2/8", "2/4", "1/32", "1/8", "1/4", "1/1")
"""The bit-widths of the papers' tables."""

EDGES = {"8": (8,), "32": (32,), "both": (8, 32)}
MINIATURE = "digits"

BIDM = "bidm"
"""A structure, too: as that method builds it."""

FORMS = cost.STRUCTURES | {BIDM: (1, 1)}

Printed = dict[tuple[str, str], dict[str, float]]
"""(bits, structure) -> metric -> the paper's number."""


class Asked(NamedTuple):
    """What is counted: a network at bits, edges and in a structure of choice; or a recipe, or those of methods.

    bits: "W/A"; None: all of the papers' tables that suit the structure.
    model: a recipe's unet.name; None: the networks of the paper, not the miniatures.
    edges: bits of the layers next to input and output, a key of EDGES; None: both.
    structure: one of FORMS; None: plain, and beside it those that the papers print.
    recipe (with overrides), method ("a,b" or ALL): counted as built.
    """

    bits: str | None = None
    model: str | None = None
    edges: str | None = None
    structure: str | None = None
    recipe: str | None = None
    method: str | None = None
    overrides: Sequence[str] = ()


def counted(asked: Asked, scales: str = "paper", attention: bool = False) -> tuple[pd.DataFrame, list[str]]:
    """The table of `built` or `run`, with its notes."""
    specs = chosen(asked)
    return built(specs, scales, attention) if specs else run(*asked[:4], scales, attention)


def taken_apart(by: str, asked: Asked, scales: str = "paper", attention: bool = False) -> tuple[str, pd.DataFrame]:
    """The table of `parts_built` or `parts`, with its title. by: "layer" or "block"."""
    specs = chosen(asked, by)
    if specs:
        return f"{specs[0].id}, by {by}", parts_built(by, specs[0], scales, attention)
    bits, model, edges, structure = asked[:4]
    return f"{model} at W/A = {bits}, by {by}", parts(by, bits, model, edges, structure, scales, attention)


def run(
    bits: str | None = None,
    model: str | None = None,
    edges: str | None = None,
    structure: str | None = None,
    scales: str = "paper",
    attention: bool = False,
) -> tuple[pd.DataFrame, list[str]]:
    """Full precision, then one row per bits, structure and edge bits; and the notes on the papers' numbers there.

    bits, model, edges, structure: as of Asked. bidm is counted as built, where a recipe of the network has that method.
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
        if model is not None and structure == BIDM:
            _bidm(found)  # raises where no recipe builds it
        network = cost.of_unet(found[0].unet, build_unet)
        printed, in_tables = _printed(found)
        choices = [(Bits(), "plain")]
        for weight, activation in chosen:
            beside = [form for text, form in printed if text == f"{weight}/{activation}"]
            for form in [structure] if structure else dict.fromkeys(["plain", *beside]):
                if weight < FP_BITS and _fits(form, weight, activation) and (form != BIDM or _of_method(found, BIDM)):
                    choices += [(Bits(weight, activation, edge), form) for edge in sides]
        full = cost.total(cost.bill(network, Bits(), attention=attention))
        for choice, form in choices:
            parts = _bill(form, found, choice, scales, attention)
            counted = cost.metrics(cost.total(parts), full)
            key = (str(choice), form)
            told |= set(in_tables.get(key, ()))
            row = {"Model": name, "Structure": form, **_row(choice, counted, printed.get(key, {}))}
            rows.append(row | {"Paper's tables": ", ".join(in_tables.get(key, ()))})
    return pd.DataFrame(rows), _notes(told)


def built(specs: Sequence[Recipe], scales: str = "paper", attention: bool = False) -> tuple[pd.DataFrame, list[str]]:
    """One row per recipe, its network counted as its method builds it; and the notes on the papers' numbers there.

    W/A: of most weights. Beyond plain: more than layers of these bits take without the method's additions, and without
    what it leaves real. In fp32: the share of the weights that stay so.
    """
    _check(None, scales)
    rows, told = [], set()
    for spec in specs:
        network, student = cost.of_unet(spec.unet, build_unet), _student(spec)
        bits = cost.main_bits(student)
        found = cost.total(cost.bill_as_built(student, scales, attention))
        plain = cost.total(cost.bill(network, bits, scales=scales, attention=attention))
        full = cost.total(cost.bill(network, Bits(), attention=attention))
        paper, in_tables = _cells(spec)
        told |= set(in_tables)
        real = sum(layer.weights for layer in student.layers if layer.built.weight == FP_BITS)
        rows.append(
            {
                "Recipe": spec.id,
                "Method": spec.method["name"],
                "Model": spec.unet.name,
                **_row(bits, cost.metrics(found, full), paper),
                "Beyond plain: Size (MiB)": round(found.size_mb - plain.size_mb, 4),
                "Beyond plain: OPs (G)": round((found.ops - plain.ops) / GIGA, 4),
                "Weights in fp32 (%)": round(100 * real / sum(layer.weights for layer in student.layers), 2),
                "Paper's tables": ", ".join(in_tables),
            }
        )
    return pd.DataFrame(rows), _notes(told)


def chosen(asked: Asked, by: str | None = None) -> list[Recipe]:
    """The recipes that are asked for, in the order of METHODS; none where bits are at choice.

    by: for `parts_built`, which takes one recipe.
    Raises: BdmError for what does not exist, does not go together, or leaves nothing.
    """
    bits, model, edges, structure, recipe, method, overrides = asked
    if overrides and recipe is None:
        raise BdmError("--set changes one recipe.\n  name it: --recipe NAME")
    if recipe is None and method is None:
        return []
    if edges is not None or structure is not None:
        raise BdmError(
            "--edges and --structure are for bits at choice; a recipe says how its network is built.\n"
            "  leave them out, or change the recipe: --recipe NAME --set method.edge_bits=32"
        )
    if recipe is not None:
        if method is not None or bits is not None or model is not None:
            raise BdmError("a recipe says its method, bits and network.\n  leave out --method, --bits and --model")
        return [recipes.load(recipe, overrides)]
    if by is not None:
        raise BdmError(f"--by-{by} takes one network apart.\n  name its recipe: --recipe NAME")
    names = list(methods.METHODS) if method == ALL else [part.strip() for part in method.split(",")]
    for name in names:
        if name not in methods.METHODS:
            raise unknown("method", name, methods.METHODS, f"or all: --method {ALL}")
    wanted = None if bits is None else parse_bits(bits)
    found = [spec for specs in _models(model).values() for spec in specs if spec.method["name"] in names]
    found = [spec for spec in found if (own := _bits(spec)) is not None and wanted in (None, own)]
    if not found:
        where = " ".join(part for part in (f"on {model}" if model else "", f"at {bits}" if bits else "") if part)
        raise BdmError(
            f"no recipe has the method {' or '.join(names)} {where}".rstrip() + ".\n"
            "  allowed: what bdm recipes lists; a network at any bits: without --method"
        )
    return sorted(found, key=lambda spec: list(methods.METHODS).index(spec.method["name"]))


def _bits(spec: Recipe) -> tuple[int, int] | None:
    """As its name says; None of a recipe that only others extend."""
    try:
        return cost.parse_recipe(spec.name)[1]
    except ValueError:
        return None


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
    return _taken_apart(by, network, _bill(form, found, choice, scales, attention), kind.scope)


def parts_built(by: str, spec: Recipe, scales: str = "paper", attention: bool = False) -> pd.DataFrame:
    """As `parts`, of a recipe's network as its method builds it."""
    _check(None, scales)
    student = _student(spec)
    return _taken_apart(
        by, student, cost.bill_as_built(student, scales, attention), spec.method.get("ebb_scope", cost.PLAIN.scope)
    )


def _taken_apart(by: str, network: NetworkCost, rows: list[Part], scope: int) -> pd.DataFrame:
    table = _by_layer(network, rows, scope) if by == "layer" else _by_block(network, rows, scope)
    for what in ("Size (MiB)", "OPs (G)"):
        table.insert(len(table.columns), f"{what.split()[0]} share (%)", 100 * table[what] / table[what].sum())
    whole = {"Block": "", **{name: table[name].sum() for name in table.select_dtypes("number").columns}}
    table = pd.concat([table, pd.DataFrame([{**whole, table.columns[0]: "total"}])], ignore_index=True)
    return table.round(dict.fromkeys(table.select_dtypes("number").columns, 6))


def sheets(table: pd.DataFrame, form: Format) -> list[tuple[str, pd.DataFrame]]:
    """What `run` or `built` gave, as (title, table) to print: every column for programs, the main ones for people.

    For people, "%" is the difference from the paper's number beside it, "+" what a recipe has beyond plain, and "x" the
    saving against full precision, with the paper's in brackets. On a terminal there is one table per network.
    """
    if form in (Format.json, Format.csv):
        return [("", table)]
    names = {"Size (MiB)": "Size MiB", "Paper: Size (MB)": "Paper MB", "OPs (G)": "OPs G", "Paper: OPs (G)": "Paper G"}
    short = table[["Model", "W/A", "Edges", *names]].rename(columns=names)
    if "Recipe" in table:
        short.insert(1, "Recipe", table["Recipe"])
        for after, name, what in ((5, "+ MiB", "Size (MiB)"), (8, "+ G", "OPs (G)")):
            short.insert(after, name, table[f"Beyond plain: {what}"].round(3))
        short["Size x"], short["OPs x"] = table["Size saving"], table["OPs saving"]
    else:
        short["W/A"] = short["W/A"].where(table["Structure"] == "plain", table["W/A"] + " " + table["Structure"])
        short.insert(5, "Size %", table["Size difference (%)"].map(_signed))
        short["OPs %"] = table["OPs difference (%)"].map(_signed)
        short["Size x"], short["OPs x"] = _with_paper(table, "Size saving"), _with_paper(table, "OPs saving")
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
    return _networks(tuple(recipes.names()))


@functools.cache
def _networks(names: tuple[str, ...]) -> dict[str, list[Recipe]]:
    """Of these recipes; there are many, and a call of the command needs them more than once."""
    found: dict[str, list[Recipe]] = {}
    for name in names:
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
    if structure is not None and structure not in FORMS:
        raise unknown("--structure", structure, FORMS)
    if scales not in cost.SCALES:
        raise unknown("--scales", scales, cost.SCALES)


def _fits(structure: str, weight: int, activation: int) -> bool:
    """Whether a structure is for these bits."""
    needed = FORMS[structure] or (None, None)
    return all(n in (None, b) for n, b in zip(needed, (weight, activation), strict=True))


def _check_fit(structure: str, weight: int, activation: int) -> None:
    if not _fits(structure, weight, activation):
        needed = "/".join("any" if n is None else str(n) for n in FORMS[structure])
        raise BdmError(f"--structure {structure} is not for --bits {weight}/{activation}.\n  its bits: {needed}")


def _bill(form: str, found: list[Recipe], bits: Bits, scales: str, attention: bool) -> list[Part]:
    """A network in one of FORMS."""
    if form == BIDM:
        spec = recipes.load(_bidm(found), [f"method.edge_bits={bits.edge}"])
        return cost.bill_as_built(_student(spec), scales, attention)
    return cost.bill(cost.of_unet(found[0].unet, build_unet), bits, _structure(form, found), scales, attention)


def _student(spec: Recipe) -> NetworkCost:
    return cost.of_student(spec, build_unet, methods.outline)


def _of_method(found: list[Recipe], method: str) -> list[str]:
    return [spec.name for spec in found if spec.method["name"] == method]


def _bidm(found: list[Recipe]) -> str:
    """The network's recipe of that method. Raises: BdmError if it has none."""
    names = _of_method(found, BIDM)
    if not names:
        known = [name for name, specs in models().items() if _of_method(specs, BIDM)]
        raise BdmError(
            f"--structure bidm is counted as a recipe builds it; none of '{found[0].unet.name}' has that method.\n"
            f"  networks that have one: {', '.join(known) or '(none)'}"
        )
    return names[0]


def _structure(name: str, found: list[Recipe]) -> Structure:
    """With the network's own scope of two bases."""
    scopes = [recipe.method["ebb_scope"] for recipe in found if "ebb_scope" in recipe.method]
    return Structure(name, max(scopes, default=cost.PLAIN.scope))


def _printed(found: list[Recipe]) -> tuple[Printed, dict[tuple[str, str], dict[str, None]]]:
    """The papers' numbers for networks of these recipes' data sets, and the tables that have them."""
    datasets = {recipe.data.dataset for recipe in found}
    printed, in_tables = {}, {}
    for cell in tables.cells().itertuples():
        if cell.metric in tables.COUNTED and cell.recipe:
            dataset, (weight, activation), method = cost.parse_recipe(cell.recipe)
            forms = (BIDM, "bidm-paper") if method == BIDM else (cost.OF_METHOD.get(method),)
            if dataset in datasets:
                for form in filter(None, forms):
                    key = (f"{weight}/{activation}", form)
                    printed.setdefault(key, {}).setdefault(cell.metric, float(cell.value))
                    in_tables.setdefault(key, {})[cell.table] = None
    return printed, in_tables


def _cells(spec: Recipe) -> tuple[dict[str, float], list[str]]:
    """What the papers print of a recipe's size and operations, and in which tables."""
    cells = tables.cells()
    cells = cells[(cells["recipe"] == spec.id) & cells["metric"].isin(tables.COUNTED)]
    found: dict[str, float] = {}
    for cell in cells.itertuples():
        found.setdefault(cell.metric, float(cell.value))
    return found, list(dict.fromkeys(cells["table"]))


def _notes(told: set[str]) -> list[str]:
    return [f"Table {id}: {note}" for id, spec in tables.specs().items() if id in told for note in spec.accounting]


def _row(bits: Bits, counted: dict[str, float], paper: dict[str, float]) -> dict[str, object]:
    def difference(metric: str) -> float | None:
        return round(100 * (counted[metric] / paper[metric] - 1), 2) if metric in paper else None

    return {
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
