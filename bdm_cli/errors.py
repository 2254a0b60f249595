"""The user's mistakes: one message, no traceback, exit code 2."""

import difflib
from collections.abc import Iterable


class BdmError(Exception):
    """A mistake the user can mend. The text says what was given, what is allowed and what to do next."""


def nearest(given: str, known: Iterable[str]) -> str:
    """ " Did you mean '...'?" with the known name that is most like the given one (the first of equals), or ""."""
    likeness = {name: difflib.SequenceMatcher(None, given, name).ratio() for name in sorted(known)}
    best = max(likeness, key=likeness.get, default=None)
    return f" Did you mean '{best}'?" if best is not None and likeness[best] >= 0.5 else ""


def unknown(kind: str, given: object, known: Iterable[str], hint: str = "") -> BdmError:
    """The error for a name that is not one of `known`, with the nearest known name if there is one."""
    known = sorted(known)
    lines = [f"unknown {kind} '{given}'.{nearest(str(given), known)}"]
    lines.append(f"  known: {', '.join(known) if known else '(none)'}")
    if hint:
        lines.append(f"  {hint}")
    return BdmError("\n".join(lines))
