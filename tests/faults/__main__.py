"""Strike every process of an installation at every moment, and say what came of it.

    python -m tests.faults --out table.md
    python -m tests.faults --process web --process agent --moment capture --signal KILL

The whole takes two hours. Exit status 1 if anything was wrong. ``ORKESTR_TEST_VAR`` names a var
directory whose base images are used again.
"""

from __future__ import annotations

import argparse
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx

from tests.faults.cell import AWAY, Cell, Known, Result, run_cell
from tests.faults.installation import Installation, installed
from tests.faults.moments import MOMENTS
from tests.faults.processes import PROCESSES, Process
from tests.faults.table import markdown, text_of
from tests.faults.truth import settled_holdings

SIGNALS = {"KILL": signal.SIGKILL, "STOP": signal.SIGSTOP}


def main(argv: Sequence[str]) -> int:
    """Exit status 0 when nothing was wrong in any cell."""
    options = read_options(argv)
    # Whatever asks it to stop, also where a shell has it ignore that: nothing is left behind.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(1))
    results: list[Result] = []
    moments = options.moment
    try:
        with installed() as installation:
            for result in run(installation, options, moments):
                results.append(result)
                say(f"{result.process} {result.how} {result.moment}: {text_of(result)}")
                for line in (*result.wrong, *(result.told if options.verbose else ())):
                    say(f"    {line}")
                write(options.out, results, moments)
    finally:
        say(f"\n{markdown(results, moments)}")
    return int(any(result.wrong for result in results))


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    """What was asked for; everything, if nothing was."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    names = [process.name for process in PROCESSES]
    parser.add_argument("--process", action="append", choices=names)
    parser.add_argument("--moment", action="append", choices=list(MOMENTS))
    parser.add_argument("--signal", action="append", choices=list(SIGNALS))
    parser.add_argument("--out", type=Path, help="write the table into this file as well")
    parser.add_argument("--settle", type=float, default=30.0, help="seconds to wait for rows")
    parser.add_argument("--verbose", action="store_true", help="what each client was told")
    options = parser.parse_args(argv)
    options.process = options.process or names
    options.moment = options.moment or list(MOMENTS)
    options.signal = options.signal or list(SIGNALS)
    return options


def run(
    installation: Installation, options: argparse.Namespace, moments: Sequence[str]
) -> Iterator[Result]:
    """All cells that were asked for; an installation that does not come back ends it."""
    Cell.settle_seconds = options.settle
    known = Known(settled_holdings(installation))
    chosen = [process for process in PROCESSES if process.name in options.process]
    # A moment at a time, so that what was interrupted says something of every process.
    for moment in moments:
        for how in (SIGNALS[name] for name in options.signal):
            for process in chosen:
                yield one(installation, known, process, how, moment)


def one(
    installation: Installation, known: Known, process: Process, how: signal.Signals, moment: str
) -> Result:
    """One cell, or the reason for which there is none; what breaks a cell is a result too."""
    if how not in process.signals:
        reason = f"need not be noticed: {process.why_not}"
        return Result(process.name, how.name, moment, skipped=reason)
    if moment in process.absent:
        reason = "a build's container has ended before its image is made"
        return Result(process.name, how.name, moment, skipped=reason)
    try:
        return run_cell(installation, known, process, how, moment)
    except (AssertionError, httpx.HTTPError, *AWAY) as error:
        say(f"{traceback.format_exc()}\n{installation.stack.explain()}")
        wrong = f"the cell could not be run to its end: {error}"
        # As an operator would: stop it, start it again, and see what there is then.
        installation.start_over()
        known.holdings = settled_holdings(installation)
        return Result(process.name, how.name, moment, wrong=(wrong,))


def write(out: Path | None, results: Sequence[Result], moments: Sequence[str]) -> None:
    """The table so far, so that what was found outlives an interruption."""
    if out is not None:
        out.write_text(markdown(results, moments))


def say(line: str) -> None:
    """Print at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
