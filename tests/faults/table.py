"""The matrix as Markdown: a table of processes and moments, and below it what was wrong."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Sequence

from hostruntime.host.patience import slowness
from tests.faults.cell import Result
from tests.lanes import TREE


def text_of(result: Result) -> str:
    """A cell: seconds until it answered / until no row was wrong; what was wrong is below."""
    if result.skipped:
        return "n/a"
    seconds = f"{_seconds(result.back)}/{_seconds(result.settled)}"
    return f"**wrong** {seconds}" if result.wrong else f"ok {seconds}"


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.1f}"


def commit() -> str:
    """What was tried."""
    asked = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(asked, cwd=TREE, capture_output=True, text=True).stdout.strip()


def markdown(results: Sequence[Result], moments: Iterable[str]) -> str:
    """The whole of it."""
    moments = list(moments)
    cells = {(one.process, one.how, one.moment): one for one in results}
    lines = dict.fromkeys((one.process, one.how) for one in results)
    table = [
        f"| struck | {' | '.join(moments)} |",
        f"|---|{'---|' * len(moments)}",
        *(
            f"| {process} {how.removeprefix('SIG')} | "
            + " | ".join(
                text_of(cells[process, how, moment]) if (process, how, moment) in cells else ""
                for moment in moments
            )
            + " |"
            for process, how in lines
        ),
    ]
    wrong = [
        f"- **{one.process} {one.how.removeprefix('SIG')} × {one.moment}**: {what}"
        for one in results
        for what in one.wrong
    ]
    skipped = dict.fromkeys(
        f"- {one.process} {one.how.removeprefix('SIG')}"
        + ("" if one.how == "SIGSTOP" else f" × {one.moment}")
        + f": {one.skipped}"
        for one in results
        if one.skipped
    )
    bad = sum(bool(one.wrong) for one in results)
    ran = sum(not one.skipped for one in results)
    parts = [
        f"Commit {commit()}, {os.cpu_count()} CPUs with a load of {os.getloadavg()[2]:.0f}, "
        f"{slowness():.1f} times slower than an ordinary machine.",
        f"{ran} cells, {bad} wrong. In each: seconds from the strike until everything answered / "
        "from then until no row was wrong.",
        "\n".join(table),
        "What was wrong:\n\n" + ("\n".join(wrong) or "nothing"),
        "Not applicable (n/a):\n\n" + ("\n".join(skipped) or "none"),
    ]
    return "\n\n".join(parts) + "\n"
