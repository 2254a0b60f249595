"""The home directory ($BDM_HOME, else the current one) and where a recipe's paths lie."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "package:"


def home() -> Path:
    return Path(os.environ.get("BDM_HOME") or ".")


@contextlib.contextmanager
def home_at(folder: str) -> Iterator[None]:
    """Another home directory for a while, for work whose output is not kept."""
    before = os.environ.get("BDM_HOME")
    os.environ["BDM_HOME"] = folder
    try:
        yield
    finally:
        os.environ.pop("BDM_HOME")
        if before is not None:
            os.environ["BDM_HOME"] = before


def locate(path: str) -> Path:
    """'package:x' lies in the package's weights folder; anything else below the home directory, unless absolute."""
    if path.startswith(PACKAGE):
        return Path(__file__).resolve().parent / "weights" / path.removeprefix(PACKAGE)
    return home() / Path(path).expanduser()
