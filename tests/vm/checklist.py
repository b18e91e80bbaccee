"""What was tried on a release, whether it held, and how long it took."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")
_WIDTH = 62


class Lacking(Exception):  # noqa: N818 - not a fault of its own
    """What this check needs did not come about; the check that failed says why."""


@dataclass(frozen=True)
class Row:
    """One check's outcome; ``why`` is empty when it held."""

    name: str
    held: bool
    seconds: float
    why: str = ""


@dataclass
class Checklist:
    """The checks of one release, in the order in which they ran."""

    say: Callable[[str], None]
    rows: list[Row] = field(default_factory=list)

    def check(self, name: str, action: Callable[[], T]) -> T | None:
        """Run one check: it failed if it raises, whatever it is.  Its answer, else None."""
        self.say(f"… {name}")
        began = time.monotonic()
        answer: T | None = None
        why = ""
        try:
            answer = action()
        except Lacking as lacking:
            why = f"not tried: {lacking}"
        except Exception as error:  # noqa: BLE001 - the others are to be tried all the same
            where = traceback.extract_tb(error.__traceback__)[-1]
            why = f"{type(error).__name__}: {error} ({where.name}, line {where.lineno})"
        row = Row(name, not why, time.monotonic() - began, why)
        self.rows.append(row)
        self.say(line_of(row))
        return answer

    @property
    def failed(self) -> list[Row]:
        """The checks that did not hold."""
        return [row for row in self.rows if not row.held]


def line_of(row: Row) -> str:
    """One check in the table on the terminal, with what went wrong below it."""
    verdict = "ok" if row.held else "FAILED"
    line = f"  {row.name:<{_WIDTH}} {verdict:<6} {row.seconds:7.1f} s"
    return line if row.held else "\n      ".join([line, *row.why.splitlines()])


def needed[T](value: T | None, what: str) -> T:
    """``value``, or Lacking."""
    if value is None:
        raise Lacking(what)
    return value
