"""What people see: messages and progress on stderr, the asked-for table on stdout."""

import contextlib
import enum
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    import pandas as pd

PLAIN_EVERY_S = 10.0
UNBOUNDED = 10**6
SHORT_CELL = 24
"""Cells up to so many characters are never broken over lines."""
FILE_WIDTH = 200
"""Width of a table that does not go to a terminal."""

console = Console(stderr=True, highlight=False, soft_wrap=True)


class Format(enum.StrEnum):
    table = "table"
    json = "json"
    csv = "csv"
    md = "md"
    latex = "latex"


def quiet() -> bool:
    """Whether this process is a worker of a sweep, whose parent shows the progress ($BDM_QUIET)."""
    return bool(os.environ.get("BDM_QUIET"))


def say(text: str) -> None:
    """One line for people, on stderr."""
    if not quiet():
        console.print(text, markup=False)


def show(frame: "pd.DataFrame", form: Format, title: str = "") -> None:
    """Print a table on stdout in the asked form. Missing cells are empty (null in JSON).

    Of a distributed launch only the first process prints.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    if form == Format.json:
        rows = json.loads(frame.to_json(orient="records", double_precision=10))
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    elif form == Format.csv:
        print(frame.to_csv(index=False), end="")
    elif form == Format.md:
        print(frame.fillna("").to_markdown(index=False, disable_numparse=True))
    elif form == Format.latex:
        print(frame.fillna("").to_latex(index=False, escape=True), end="")
    else:
        table = Table(title=title or None, title_justify="left", title_style="bold")
        for column in frame.columns:
            numeric = frame[column].map(lambda value: isinstance(value, int | float)).any()
            short = frame[column].map(lambda value: len(str(value)) <= SHORT_CELL).all()
            table.add_column(str(column), justify="right" if numeric else "left", overflow="fold", no_wrap=bool(short))
        for row in frame.itertuples(index=False):
            table.add_row(*("" if value is None or value != value else str(value) for value in row))
        screen = Console(highlight=False, width=None if sys.stdout.isatty() else FILE_WIDTH)
        if Console(width=UNBOUNDED).measure(table).maximum > screen.width:  # rather broken lines than lost words
            for column in table.columns:
                column.no_wrap = False
        screen.print(table)


@contextlib.contextmanager
def progress(what: str, total: int, unit: str = "it", done: int = 0) -> Iterator[Callable[..., None]]:
    """A progress display for long work: `advance(n, note)` after each piece.

    A bar with rate and time left on a terminal, else a plain line every ten seconds.
    """
    start, first = time.monotonic(), done

    def rate() -> str:
        elapsed = time.monotonic() - start
        return f"{(done - first) / elapsed:.1f} {unit}/s" if elapsed > 0 and done > first else ""

    if quiet() or not console.is_terminal:
        printed = time.monotonic()

        def advance(n: int = 1, note: str = "") -> None:
            nonlocal done, printed
            done += n
            if time.monotonic() - printed >= PLAIN_EVERY_S and not quiet():
                printed = time.monotonic()
                left = (printed - start) / (done - first) * (total - done) if done > first else None
                pace = f"{rate()}, {left:.0f} s left" if left is not None else "starting"
                print(f"{what}: {done}/{total} {unit}, {pace}, {note}".rstrip(", "), file=sys.stderr)

        yield advance
        return

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total, completed=done, rate="", note="")

        def advance(n: int = 1, note: str = "") -> None:
            nonlocal done
            done += n
            bar.update(task, completed=done, rate=rate(), note=note)

        yield advance
