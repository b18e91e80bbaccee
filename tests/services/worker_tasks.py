"""Tasks for the worker's tests: each writes down when it ran and where."""

from __future__ import annotations

import os
import time
from pathlib import Path


def note(journal: str, name: str, seconds: float = 0.0) -> None:
    """Write ``start <name> <pid>``, take ``seconds``, write ``end <name> <pid>``."""
    write(journal, "start", name)
    time.sleep(seconds)
    write(journal, "end", name)


def fail(journal: str, name: str) -> None:
    """Write ``start …`` and raise."""
    write(journal, "start", name)
    raise RuntimeError("as asked")


def write(journal: str, what: str, name: str) -> None:
    """One line, in one write, so that lines of several processes do not mix."""
    with Path(journal).open("a") as stream:
        stream.write(f"{what} {name} {os.getpid()} {time.monotonic()}\n")
