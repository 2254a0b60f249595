"""The METHODS table, in the papers' row order, and building a recipe's method. Importing it loads no torch."""

from typing import TYPE_CHECKING

import pydantic

from bdm_cli.errors import BdmError
from bdm_cli.recipe import Recipe, faults
from bdm_cli.registry import Entry, resolve

if TYPE_CHECKING:
    from bdm_cli.methods.base import Method

_HERE = "bdm_cli.methods"
METHODS = {
    "fp": Entry("FP", f"{_HERE}.fp:FullPrecision", "the teacher itself"),
    "qdiffusion": Entry("Q-Diffusion", f"{_HERE}.qdiffusion:QDiffusion", "ICCV 2023, arXiv:2302.04304"),
    "efficientdm": Entry("EfficientDM", f"{_HERE}.efficientdm:EfficientDm", "ICLR 2024, arXiv:2310.03270"),
    "lsq": Entry("LSQ", f"{_HERE}.lsq:LsqMethod", "ICLR 2020, arXiv:1902.08153"),
    "baseline": Entry("Baseline", f"{_HERE}.base:Method", "arXiv:2404.05662, Sec. 3.1"),
    "tdq": Entry("TDQ", f"{_HERE}.tdq:Tdq", "NeurIPS 2023, arXiv:2306.02316"),
    "reactnet": Entry("ReActNet", f"{_HERE}.reactnet:ReActNet", "ECCV 2020, arXiv:2003.03488"),
    "qdm": Entry("Q-DM", f"{_HERE}.qdm:QDm", "NeurIPS 2023, OpenReview sFGkL5BsPi"),
    "instabnn": Entry("INSTA-BNN", f"{_HERE}.instabnn:InstaBnn", "ICCV 2023, arXiv:2204.07439"),
    "bidiffsr": Entry("BI-DiffSR", f"{_HERE}.bidiffsr:BiDiffSr", "NeurIPS 2024, arXiv:2406.05723"),
    "highorder": Entry("High-Order", f"{_HERE}.lmb:HighOrder", "arXiv:2404.05662, App. B.1, Eq. 18"),
    "lmb": Entry("BinaryDM v1 (LMB)", f"{_HERE}.lmb:Lmb", "arXiv:2404.05662v1"),
    "ebb": Entry("+EBB", f"{_HERE}.binarydm:Ebb", "arXiv:2404.05662, Sec. 3.2"),
    "binarydm": Entry("BinaryDM", f"{_HERE}.binarydm:BinaryDM", "ICLR 2025, arXiv:2404.05662"),
    "xnorpp": Entry("XNOR++", f"{_HERE}.xnorpp:XnorPlusPlus", "BMVC 2019, arXiv:1909.13863"),
    "bbcu": Entry("BBCU", f"{_HERE}.bbcu:Bbcu", "ICLR 2023, arXiv:2210.00405"),
    "dorefa": Entry("DoReFa", f"{_HERE}.dorefa:DoReFa", "arXiv:1606.06160"),
    "reste": Entry("ReSTE", f"{_HERE}.reste:ReSte", "ICCV 2023, DravenALG/ReSTE"),
    "xnor": Entry("XNOR", f"{_HERE}.xnor:Xnor", "ECCV 2016, arXiv:1603.05279"),
    "bidm": Entry("BiDM", f"{_HERE}.bidm:BiDm", "NeurIPS 2024, arXiv:2412.05926"),
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
