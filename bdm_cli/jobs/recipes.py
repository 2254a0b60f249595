"""`bdm recipes`: the list, or one recipe with every key resolved."""

from collections.abc import Sequence

import pandas as pd

from bdm_cli import inputs, methods, recipe
from bdm_cli.recipe import Recipe


def run(name: str | None = None, overrides: Sequence[str] = ()) -> pd.DataFrame:
    """All recipes (name, summary, method, bits, training steps, what is missing), or one as key and value."""
    if name is None:
        return pd.DataFrame([_line(recipe.load(name)) for name in sorted(recipe.names())])
    spec = recipe.load(name, overrides)
    method = methods.build(spec)
    table = recipe.resolved(spec) | {f"method.{field}": getattr(method, field) for field in method.__dataclass_fields__}
    return pd.DataFrame({"key": table.keys(), "value": [str(value) for value in table.values()]})


def _line(spec: Recipe) -> dict[str, object]:
    missing = inputs.missing(spec)
    return {
        "Recipe": spec.name,
        "Summary": spec.summary,
        "Method": methods.METHODS[spec.method["name"]].label,
        "Steps": spec.train.steps,
        "Inputs": "ready" if not missing else "missing: " + ", ".join(text.split(":")[0] for text in missing),
    }
