"""The METHODS table, in the papers' row order, and building a recipe's method. Importing it loads no torch."""

from typing import TYPE_CHECKING

import pydantic

from bdm_cli.errors import BdmError
from bdm_cli.recipe import Recipe, faults
from bdm_cli.registry import Entry, resolve

if TYPE_CHECKING:
    from bdm_cli.methods.base import Method

METHODS = {
    "fp": Entry("FP", "bdm_cli.methods.fp:FullPrecision", "the teacher itself"),
    "lsq": Entry("LSQ", "bdm_cli.methods.lsq:LsqMethod", "arXiv:1902.08153"),
    "baseline": Entry("Baseline", "bdm_cli.methods.base:Method", "arXiv:2404.05662, Sec. 3.1"),
    "ebb": Entry("+EBB", "bdm_cli.methods.binarydm:Ebb", "arXiv:2404.05662, Sec. 3.2"),
    "binarydm": Entry("BinaryDM", "bdm_cli.methods.binarydm:BinaryDM", "arXiv:2404.05662"),
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
