"""The lazy table that METHODS, METRICS and the other look-ups by name share."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from bdm_cli.errors import unknown


@dataclass(frozen=True)
class Entry:
    """One line of a table: how papers print it, where the code is, where the definition is."""

    label: str
    target: str  # "module:Name", imported by resolve
    source: str


def resolve(kind: str, name: str, table: Mapping[str, Entry]) -> Any:
    """Import and return what `name` stands for. Raises: BdmError if `name` is not in the table."""
    if name not in table:
        raise unknown(kind, name, table)
    module, attribute = table[name].target.split(":")
    return getattr(import_module(module), attribute)
