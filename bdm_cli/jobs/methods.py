"""`bdm methods`: what each method costs, where it stands in the papers and what was run; or one in its own words."""

import inspect
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, get_args, get_origin

import pandas as pd

from bdm_cli import recipe as recipes
from bdm_cli import records
from bdm_cli.diffusion.models import build_unet
from bdm_cli.diffusion.sampling import times
from bdm_cli.methods import METHODS, build, outline
from bdm_cli.metrics import cost
from bdm_cli.output import progress
from bdm_cli.paper import tables
from bdm_cli.quant.layers import QuantAttnProcessor
from bdm_cli.quant.swap import quantized_layers
from bdm_cli.recipe import Recipe
from bdm_cli.registry import resolve

NETWORK = "bedrooms"
"""Whose recipes (LDM-4) say what a method costs."""

MINIATURE = "digits"

MAIN_BITS = ((1, 4), (2, 4), (4, 4), (1, 1))
"""Of a method's recipes the first with these bits is counted."""


def run(with_cost: bool = True) -> pd.DataFrame:
    """One row per method, in the papers' order. with_cost: also what needs a network: size, operations, packing."""
    measured, lines = _runs(), []
    with progress("counting", len(METHODS) if with_cost else 0, "methods") as advance:
        for name, entry in METHODS.items():
            (bits, places), known = _printed(name), _recipes(name)
            line = {
                "Method": name,
                "Printed as": entry.label,
                "Paper": entry.source,
                "Definition": entry.definition,
                "W/A in papers": bits,
                "Tables": places,
            }
            if with_cost:
                line |= _cost(_main(known, NETWORK)) | {"Packs": _packs(_main(known, MINIATURE))}
                advance(1, name)
            lines.append(line | {"Recipes": len(known), "Digits runs": len(measured.get(name, ()))})
    return pd.DataFrame(lines)


def one(name: str) -> pd.DataFrame:
    """One method: where it comes from, what it is in its own words, its fields with default and allowed values.

    Raises: BdmError if there is no such method.
    """
    kind, entry = resolve("method", name, METHODS), METHODS[name]
    about, said, notes = _told(kind)
    fields = kind.__pydantic_fields__
    bits, places = _printed(name)
    rows = [
        ("name", name, "", about),
        ("printed as", entry.label, "", f"in tables {places}, at {bits}" if places else "in no table"),
        ("paper", entry.source, "", f"definition: {entry.definition}"),
        *((f"method.{key}", _toml(info.default), _allowed(info), said.get(key, "")) for key, info in fields.items()),
        ("notes", "", "", notes),
        ("recipes", ", ".join(spec.name for spec in _recipes(name)), "", ""),
    ]
    return pd.DataFrame([row for row in rows if any(row[1:])], columns=["Key", "Value", "Allowed", "Meaning"])


def narrow(table: pd.DataFrame) -> pd.DataFrame:
    """What `run` gave, for a terminal."""
    named = table["Printed as"] + ", " + table["Paper"]
    shown = table.drop(columns=["Printed as", "Counted"], errors="ignore").assign(Paper=named)
    return shown.rename(
        columns={"W/A in papers": "W/A", "Size (MiB)": "MiB", "OPs (G)": "G OPs", "Digits runs": "Digits"}
    )


# ---- recipes, tables and runs ----------------------------------------------------------------------------------------


def _method_of(recipe_id: str) -> str | None:
    """The method of a recipe id; None if it follows no rule of ours."""
    switched = re.search(r"\+method\.name=([a-z]+)", recipe_id)
    try:
        return switched[1] if switched else cost.parse_recipe(recipe_id)[2]
    except ValueError:
        return None


def _recipes(method: str) -> list[Recipe]:
    """Those of a method, but for what only others extend. Names that say another method are not read."""
    own = {name: _method_of(name) for name in sorted(recipes.names())}
    found = [recipes.load(name) for name, said in own.items() if said == method or (said and said not in METHODS)]
    return [spec for spec in found if spec.method["name"] == method]


def _runs() -> dict[str, set[str]]:
    """The runs on the miniatures that left records, by method."""
    found: dict[str, set[str]] = {}
    for record in records.read():
        if record.recipe.startswith(f"{MINIATURE}-"):
            found.setdefault(_method_of(record.recipe), set()).add(record.run)
    return found


def _printed(method: str) -> tuple[str, str]:
    """The bits and the tables of the papers that have a method, both as they come there."""
    cells = tables.cells()
    found = cells[[bool(id) and _method_of(id) == method for id in cells["recipe"]]]
    bits = (cost.parse_recipe(id)[1] for id in found["recipe"])
    return " ".join(dict.fromkeys(f"{w}/{a}" for w, a in bits)), ", ".join(dict.fromkeys(found["table"]))


def _main(found: Iterable[Recipe], dataset: str) -> Recipe | None:
    """The recipe of a data set that stands for the method: by MAIN_BITS, else the first."""
    named = {}
    for spec in found:
        place, bits, _ = cost.parse_recipe(spec.name)
        if place == dataset:
            named.setdefault(bits, spec)
    order = [*MAIN_BITS, *named]
    return next((named[bits] for bits in order if bits in named), None)


# ---- what needs a network --------------------------------------------------------------------------------------------


def _cost(spec: Recipe | None) -> dict[str, object]:
    """Size and operations as its method builds it, with the papers' choice of scales."""
    if spec is None:
        return {"Size (MiB)": None, "OPs (G)": None, "Counted": ""}
    found = cost.total(cost.bill_as_built(cost.of_student(spec, build_unet, outline), "paper"))
    return {"Size (MiB)": round(found.size_mb, 2), "OPs (G)": round(found.ops / cost.GIGA, 3), "Counted": spec.name}


def _packs(spec: Recipe | None) -> str:
    """Whether `bdm export` takes the recipe's student, or why not; '' without a recipe.

    Asked of its quantizers on a network of random weights, which has not seen data.
    """
    if spec is None:
        return ""
    method, unet, s = build(spec), build_unet(spec.unet), spec.sample
    method.quantize_(unet)
    method.on_step_(unet, spec.train.steps, spec.train.steps)
    called = list(dict.fromkeys(times(s.sampler, spec.scheduler, s.steps, s.spacing)))
    layers = [layer for _, layer in quantized_layers(unet)]
    operands = [q for m in unet.modules() if isinstance(m, QuantAttnProcessor) for q in m.children()]
    inputs = [q for q in (*operands, *(layer.activation_quantizer for layer in layers)) if q is not None]
    if not layers:
        return "no: nothing is quantized"
    if any(layer.weight_quantizer is None for layer in layers):
        return "no: of some layers only the input is quantized"
    try:
        for layer in layers:
            layer.weight_quantizer.terms(layer.weight)
        for quantizer in inputs:
            quantizer.grid(called)
    except NotImplementedError as error:
        return f"no: {error}"
    return "yes"


# ---- a method's own words --------------------------------------------------------------------------------------------


def _told(kind: type) -> tuple[str, dict[str, str], str]:
    """Of the docstring: what stands before the fields, what it says of each field, what stands behind them.

    Fields that it does not speak of are told by the class that it extends.
    """
    fields = set(kind.__pydantic_fields__)
    parts: tuple[list[str], ...] = [], [], []  # before, of the fields, behind
    place = 0
    for line in inspect.cleandoc(kind.__doc__ or "").splitlines():
        if _names(line, fields):
            place = 1
        elif place == 1 and line and not line[0].isspace():
            place = 2
        parts[place].append(line)
    said, keys = {}, []
    flowing = re.sub(r"\s*\n\s+", " ", "\n".join(parts[1]))  # one line per entry
    for sentence in re.split(r"(?<=[.;]) +|\n", flowing):
        if named := _names(sentence, fields):
            keys, sentence = named, sentence.partition(": ")[2]
        for key in keys:
            said[key] = f"{said.get(key, '')} {sentence}".strip()
    for parent in kind.__mro__[1:]:
        if hasattr(parent, "__pydantic_fields__"):
            said = _told(parent)[1] | said
            break
    return _flowing(parts[0]), said, _flowing(parts[2])


def _names(text: str, fields: set[str]) -> list[str]:
    """The fields that "a, b: ..." is about."""
    found = re.match(r"(\w+(?:, \w+)*): ", text)
    names = found[1].split(", ") if found else []
    return names if set(names) <= fields else []


def _flowing(lines: list[str]) -> str:
    """Lines as paragraphs."""
    paragraphs = re.split(r"\n{2,}", "\n".join(lines).strip())
    return "\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _allowed(info: Any) -> str:
    """The values that a field takes, of a pydantic field's type and bounds."""
    kind = info.annotation
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        return ", ".join(_toml(value) for value in get_args(kind))
    if kind is bool:
        return "true, false"
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = [
        f"{s} {getattr(limit, key):g}" for limit in info.metadata for key, s in signs.items() if hasattr(limit, key)
    ]
    return " ".join([getattr(kind, "__name__", str(kind)), *bounds])
