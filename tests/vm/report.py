"""The result of a run: a table per release, and the Markdown that the README carries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tests.vm.checklist import Row, line_of

HEADINGS = ("date", "release", "kernel", "LXC", "PostgreSQL", "Python", "commit", "what held")


@dataclass(frozen=True)
class Result:
    """One release's outcome; ``facts`` are what its machine is made of, by heading."""

    title: str
    date: str
    facts: Mapping[str, str]
    rows: Sequence[Row] = field(default_factory=list)

    @property
    def held(self) -> bool:
        """Whether every check did, and there were some."""
        return bool(self.rows) and all(row.held for row in self.rows)


def table(result: Result) -> str:
    """The checks of a release, a line each."""
    return "\n".join([f"\n{result.title}", *map(line_of, result.rows)])


def markdown(results: Sequence[Result]) -> str:
    """One row per release, under the headings."""
    lines = [HEADINGS, tuple("---" for _ in HEADINGS), *map(_cells, results)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(result: Result) -> tuple[str, ...]:
    known = {"date": result.date, "release": result.title, "what held": _verdict(result.rows)}
    return tuple({**result.facts, **known}.get(heading, "?") for heading in HEADINGS)


def _verdict(rows: Sequence[Row]) -> str:
    failed = [row.name for row in rows if not row.held]
    if not rows:
        return "nothing was tried"
    if not failed:
        return f"all {len(rows)} checks"
    return f"{len(rows) - len(failed)} of {len(rows)} checks; not: {'; '.join(failed)}"
