"""The paper's ablations as data: what is varied, which tables print it, and the values they print."""

from collections.abc import Callable
from dataclasses import dataclass

from bdm_cli.errors import BdmError, unknown


@dataclass(frozen=True)
class Variant:
    """One row of an ablation: the recipe's own method or another one, with overrides."""

    label: str
    method: str | None = None
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ablation:
    """tables: those of the paper that print it. values: what is run when none are given. variant: a value's row."""

    title: str
    tables: tuple[str, ...]
    values: tuple[str, ...]
    variant: Callable[[str], Variant]
    help: str


def _number(value: str, what: str) -> str:
    try:
        float(value)
    except ValueError:
        raise BdmError(f"'{value}' is not a value of {what}.\n  give numbers, e.g. --values 2,4,8") from None
    return value


def _key(key: str, what: str) -> Callable[[str], Variant]:
    return lambda value: Variant(value, overrides=(f"{key}={_number(value, what)}",))


def _lrm_k(value: str) -> Variant:
    if value == "none":
        return Variant("no distillation", method="ebb")
    if value == "mse":
        return Variant("MSE", overrides=("method.distillation=mse",))
    return Variant(f"K = {value}", overrides=(f"method.lrm_k={_number(value, 'lrm-k (numbers, none or mse)')}",))


def _ebb_scope(value: str) -> Variant:
    scope, plus, center = value.partition("+")
    scope = _number(scope, "ebb-scope (blocks, or blocks+center)")
    if plus and center != "center":
        raise BdmError(f"'{value}' is not a value of ebb-scope.\n  give a number of blocks, or e.g. 6+center")
    extra = ("method.ebb_center=true",) if plus else ()
    return Variant(value, overrides=(f"method.ebb_scope={scope}", *extra))


def _lrm_update(value: str) -> Variant:
    if value == "none":
        return Variant("no LRM", method="ebb")
    every = "0" if value == "never" else _number(value, "lrm-update (iterations, never or none)")
    return Variant("never" if every == "0" else f"every {every}", overrides=(f"method.lrm_update={every}",))


def _component(value: str) -> Variant:
    labels = {"fp": "FP", "baseline": "Vanilla", "ebb": "+EBB", "binarydm": "+LRM"}
    return Variant(labels.get(value, value), method=value)


def _method(value: str) -> Variant:
    return Variant(value, method=value)


def _bidm(value: str) -> Variant:
    """k and SPD by themselves stand on the XNOR row, which is "vanilla"."""
    bare = tuple(f"method.{off}" for off in ("threshold=false", "estimator=clipped", "shortcut=false", "connections=0"))
    known = {
        "vanilla": Variant("Vanilla", "xnor"),
        "k": Variant("Learnable k", "bidm", (*bare, "method.distillation=none")),
        "tbs": Variant("TBS", "bidm", ("method.distillation=none",)),
        "spd": Variant("SPD", "bidm", (*bare, "method.filter=box")),
        "l2": Variant("TBS and L2", "bidm", ("method.distillation=l2",)),
        "bidm": Variant("TBS and SPD (BiDM)", "bidm"),
    }
    if value not in known:
        raise unknown("part of BiDM", value, known)
    return known[value]


ABLATIONS = {
    "components": Ablation(
        "components", ("7", "4"), ("fp", "baseline", "ebb", "binarydm"), _component, "methods: fp,baseline,ebb,binarydm"
    ),
    "methods-w1a1": Ablation(
        "methods at W1A1",
        ("P1",),
        ("fp", "xnorpp", "dorefa", "reactnet", "reste", "xnor", "bidm"),
        _method,
        "methods, on --recipe digits-w1a1-bidm",
    ),
    "methods-w1a4": Ablation(
        "methods at W1A4",
        ("2",),
        ("fp", "baseline", "tdq", "reactnet", "qdm", "instabnn", "bidiffsr", "binarydm"),
        _method,
        "methods, on --recipe digits-ldm-w1a4",
    ),
    "bidm": Ablation(
        "BiDM's parts",
        ("BA",),
        ("vanilla", "k", "tbs", "spd", "l2", "bidm"),
        _bidm,
        "vanilla,k,tbs,spd,l2,bidm, on --recipe digits-w1a1-bidm",
    ),
    "bidm-connections": Ablation(
        "cross-timestep connections",
        ("BC",),
        ("0", "1", "2", "6"),
        _key("method.connections", "bidm-connections"),
        "connected blocks, on --recipe digits-w1a1-bidm",
    ),
    "tau": Ablation(
        "weight of L_EBB", ("11",), ("0", "9e-2", "9e-3", "9e-4"), _key("method.tau", "tau"), "tau of Eq. 9"
    ),
    "lrm-k": Ablation("reduction K", ("14",), ("none", "mse", "2", "4", "8"), _lrm_k, "K; or none, mse"),
    "ebb-scope": Ablation(
        "EBB scope", ("10",), ("0", "2", "4", "6", "6+center"), _ebb_scope, "blocks; or blocks+center"
    ),
    "transition": Ablation(
        "transition to stage 2",
        ("12",),
        ("0", "0.05", "0.5"),
        _key("method.transition", "transition"),
        "iterations, or fractions of the training below 1",
    ),
    "lrm-update": Ablation(
        "update of the projection", ("15",), ("none", "100", "never"), _lrm_update, "iterations; or never, none"
    ),
}
