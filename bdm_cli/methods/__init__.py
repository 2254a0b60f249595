"""The METHODS table, in the papers' row order, and building a recipe's method. Importing it loads no torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import pydantic

from bdm_cli.errors import BdmError
from bdm_cli.recipe import Recipe, faults
from bdm_cli.registry import Entry, resolve

if TYPE_CHECKING:
    from torch import nn

    from bdm_cli.methods.base import Method


@dataclass(frozen=True)
class MethodEntry(Entry):
    """definition: where its definition was read, and what of it could not be (docs/fidelity.md)."""

    definition: str


_HERE = "bdm_cli.methods"
METHODS: dict[str, MethodEntry] = {
    "fp": MethodEntry("FP", f"{_HERE}.fp:FullPrecision", "the teacher itself", "nothing to define"),
    "qdiffusion": MethodEntry("Q-Diffusion", f"{_HERE}.qdiffusion:QDiffusion", "ICCV 2023, arXiv:2302.04304", "code"),
    "efficientdm": MethodEntry(
        "EfficientDM",
        f"{_HERE}.efficientdm:EfficientDm",
        "ICLR 2024, arXiv:2310.03270",
        "code, paper; 1-bit form unverified",
    ),
    "lsq": MethodEntry("LSQ", f"{_HERE}.lsq:LsqMethod", "ICLR 2020, arXiv:1902.08153", "third-party code"),
    "baseline": MethodEntry("Baseline", f"{_HERE}.base:Method", "arXiv:2404.05662, Sec. 3.1", "paper"),
    "tdq": MethodEntry("TDQ", f"{_HERE}.tdq:Tdq", "NeurIPS 2023, arXiv:2306.02316", "code; time encoding second hand"),
    "reactnet": MethodEntry(
        "ReActNet", f"{_HERE}.reactnet:ReActNet", "ECCV 2020, arXiv:2003.03488", "code; form at W1A4 unverified"
    ),
    "qdm": MethodEntry(
        "Q-DM", f"{_HERE}.qdm:QDm", "NeurIPS 2023, OpenReview sFGkL5BsPi", "second hand; formulas unverified"
    ),
    "instabnn": MethodEntry(
        "INSTA-BNN", f"{_HERE}.instabnn:InstaBnn", "ICCV 2023, arXiv:2204.07439", "second hand; formulas unverified"
    ),
    "bidiffsr": MethodEntry(
        "BI-DiffSR", f"{_HERE}.bidiffsr:BiDiffSr", "NeurIPS 2024, arXiv:2406.05723", "code; form at W1A4 unverified"
    ),
    "highorder": MethodEntry("High-Order", f"{_HERE}.lmb:HighOrder", "arXiv:2404.05662, App. B.1, Eq. 18", "paper"),
    "lmb": MethodEntry("BinaryDM v1 (LMB)", f"{_HERE}.lmb:Lmb", "arXiv:2404.05662v1", "code; paper second hand"),
    "ebb": MethodEntry("+EBB", f"{_HERE}.binarydm:Ebb", "arXiv:2404.05662, Sec. 3.2", "paper"),
    "binarydm": MethodEntry(
        "BinaryDM", f"{_HERE}.binarydm:BinaryDM", "ICLR 2025, arXiv:2404.05662", "paper; code is of an older method"
    ),
    "xnorpp": MethodEntry(
        "XNOR++", f"{_HERE}.xnorpp:XnorPlusPlus", "BMVC 2019, arXiv:1909.13863", "third-party code, second hand"
    ),
    "bbcu": MethodEntry(
        "BBCU", f"{_HERE}.bbcu:Bbcu", "ICLR 2023, arXiv:2210.00405", "code; narrowing layers unverified"
    ),
    "dorefa": MethodEntry("DoReFa", f"{_HERE}.dorefa:DoReFa", "arXiv:1606.06160", "code"),
    "reste": MethodEntry("ReSTE", f"{_HERE}.reste:ReSte", "ICCV 2023, DravenALG/ReSTE", "code"),
    "xnor": MethodEntry("XNOR", f"{_HERE}.xnor:Xnor", "ECCV 2016, arXiv:1603.05279", "code; paper second hand"),
    "bidm": MethodEntry("BiDM", f"{_HERE}.bidm:BiDm", "NeurIPS 2024, arXiv:2412.05926", "paper, code"),
}


def build(recipe: Recipe) -> "Method":
    """The recipe's method with its fields checked. Raises: BdmError that lists every fault of the [method] table."""
    fields = dict(recipe.method)
    kind = resolve("method", fields.pop("name"), METHODS)
    try:
        method = kind(**fields)
    except pydantic.ValidationError as error:
        raise faults(f"recipe '{recipe.name}'", error, kind, "method.") from None
    method.host = recipe
    problems = method.check(recipe.train.steps)
    if problems:
        raise BdmError(f"recipe '{recipe.name}' has a fault:\n" + "\n".join(f"  method.{line}" for line in problems))
    return method


class Outline(NamedTuple):
    """A recipe's student as after its training, on the meta device: structure and shapes without numbers.

    times: at which the recipe's sampler calls it, each once.
    """

    unet: "nn.Module"
    times: list[float]


def outline(recipe: Recipe) -> Outline:
    """What metrics/cost.py counts. Raises: BdmError if the method's fields or the network's are at fault."""
    import torch

    from bdm_cli.diffusion.models import build_unet
    from bdm_cli.diffusion.sampling import times

    method, s = build(recipe), recipe.sample
    with torch.device("meta"):
        unet = build_unet(recipe.unet)
        method.quantize_(unet)
        method.on_step_(unet, recipe.train.steps, recipe.train.steps)
    return Outline(unet, list(dict.fromkeys(times(s.sampler, recipe.scheduler, s.steps, s.spacing))))
