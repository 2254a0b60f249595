"""How long a piece of work takes and how much memory it holds, in a process of its own."""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from bdm_cli.errors import BdmError

LOOK_S = 0.05
"""Seconds between two looks at a process's memory."""


class Measured(NamedTuple):
    """Seconds of the work, without starting Python, and the most memory of the process and its children, in MiB."""

    wall_s: float
    peak_mib: float


def alone(work: Callable[..., object], *arguments: object) -> Measured:
    """work(*arguments) in a process that begins as a new Python; both must pickle.

    Raises: BdmError if the process ends early.
    """
    context = multiprocessing.get_context("spawn")
    mine, its = context.Pipe()
    process = context.Process(target=_work, args=(its, work, arguments))
    process.start()
    its.close()
    try:
        found = mine.recv()
    except EOFError:
        found = None
    process.join()
    if not isinstance(found, Measured):
        raise BdmError(f"the measured process ended early (exit code {process.exitcode}).\n  is there enough memory?")
    return found


def _work(its: Connection, work: Callable[..., object], arguments: tuple) -> None:
    peak, done = 0.0, threading.Event()

    def look() -> None:
        nonlocal peak
        while not done.wait(LOOK_S):
            peak = max(peak, _held_mib(os.getpid()))

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    start = time.monotonic()
    work(*arguments)
    wall_s = time.monotonic() - start
    peak = max(peak, _held_mib(os.getpid()))
    done.set()
    watcher.join()
    its.send(Measured(wall_s, peak))


def _held_mib(pid: int) -> float:
    """Memory of a process and its children, what they share counted once (PSS)."""
    total = 0.0
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) / 1024
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
                total += _held_mib(int(child))
    except (OSError, StopIteration):  # it has just ended
        pass
    return total
