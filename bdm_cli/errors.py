"""The user's mistakes: one message, no traceback, exit code 2."""

import difflib
from collections.abc import Iterable


class BdmError(Exception):
    """A mistake the user can mend. The text says what was given, what is allowed and what to do next."""


def unknown(kind: str, given: object, known: Iterable[str], hint: str = "") -> BdmError:
    """The error for a name that is not one of `known`, with the nearest known name if there is one."""
    known = sorted(known)
    near = difflib.get_close_matches(str(given), known, n=1, cutoff=0.5)
    lines = [f"unknown {kind} '{given}'." + (f" Did you mean '{near[0]}'?" if near else "")]
    lines.append(f"  known: {', '.join(known) if known else '(none)'}")
    if hint:
        lines.append(f"  {hint}")
    return BdmError("\n".join(lines))
