"""The ablations as data: every default value is a recipe that builds, and has the paper's number beside it."""

import pytest

from bdm_cli import methods, recipe
from bdm_cli.errors import BdmError
from bdm_cli.paper import tables
from bdm_cli.paper.ablations import ABLATIONS

BASES = {
    "components": "digits-w1a4",
    "methods-w1a1": "digits-w1a1-bidm",
    "methods-w1a4": "digits-ldm-w1a4",
    "bidm": "digits-w1a1-bidm",
    "bidm-connections": "digits-w1a1-bidm",
}
"""The recipes that their help names; else `bdm ablate`'s own default."""

CASES = [(name, value) for name, ablation in ABLATIONS.items() for value in ablation.values]


@pytest.mark.parametrize(("name", "value"), CASES)
def test_a_default_value_is_a_recipe_with_a_number_of_the_paper(name: str, value: str):
    ablation, base = ABLATIONS[name], BASES.get(name, "digits-w1a32")
    variant = ablation.variant(value)
    if variant.method == "fp":
        spec = recipe.load(recipe.sibling(base, "fp"))
    else:
        spec = recipe.load(base, variant.overrides, variant.method)
    methods.build(spec)
    cells = tables.cells()
    printed = cells[cells["table"].isin(ablation.tables)]
    assert spec.id in set(printed["twin"])


def test_the_parts_of_bidm():
    rows = {value: ABLATIONS["bidm"].variant(value) for value in ABLATIONS["bidm"].values}
    built = {v: methods.build(recipe.load("digits-w1a1-bidm", row.overrides, row.method)) for v, row in rows.items()}
    parts = {
        value: (method.filter, method.threshold, method.shortcut, method.connections, method.distillation)
        for value, method in built.items()
        if value != "vanilla"
    }
    assert parts == {
        "k": ("learned", False, False, 0, "none"),
        "spd": ("box", False, False, 0, "spd"),
        "tbs": ("learned", True, True, 2, "none"),
        "l2": ("learned", True, True, 2, "l2"),
        "bidm": ("learned", True, True, 2, "spd"),
    }
    assert type(built["vanilla"]).__name__ == "Xnor"
    with pytest.raises(BdmError, match=r"unknown part of BiDM 'tsb'\. Did you mean 'tbs'\?"):
        ABLATIONS["bidm"].variant("tsb")
