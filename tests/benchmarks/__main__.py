"""Every figure of RESULTS.md, in one run: ``python -m tests.benchmarks --out FILE``, as root.

Takes about half an hour with the default numbers.  Nothing is asserted: a figure is worth as much
as the conditions that the page begins with.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from hostruntime.sandbox.warm_pool import SETTING
from tests.benchmarks import calls
from tests.benchmarks.builds import measure_builds
from tests.benchmarks.report import Report, conditions
from tests.clients.making import Templates
from tests.stack import Stack, running_stack

# Many small files, as packages are, not one large one.
BALLAST = (
    "mkdir /opt/ballast && cd /opt/ballast && head -c {size} /dev/urandom | split -b 100000 -a 5 -"
)


def measure_pooled(stack: Stack, report: Report, options: argparse.Namespace) -> None:
    """An installation as it comes."""
    calls.measure_alone(stack, report, "One client, warm containers", options.rounds)
    calls.measure_rates(stack, report)
    measure_large_image(stack, report, options)
    measure_builds(stack, report, options.rounds // 2)
    calls.measure_starts(stack, report, options.burst)
    calls.wear(stack, options.commands)
    calls.measure_beside(stack, report, f"After {options.commands:,} commands", options.rounds)
    crowd = calls.crowd(stack, options.crowd)
    calls.measure_beside(stack, report, f"Beside {options.crowd:,} sandboxes", options.rounds)
    calls.disperse(stack, crowd)


def measure_large_image(stack: Stack, report: Report, options: argparse.Namespace) -> None:
    """A template whose files are new beside its base."""
    with stack.client() as client:
        templates = Templates(client, build_seconds=1200)
        try:
            ballast = BALLAST.format(size=int(options.gigabytes * 10**9))
            large = templates.ready(calls.BASE, ballast)
            title = f"{calls.BASE} and {options.gigabytes:g} GB more"
            calls.measure_images(stack, report, large, title, options.rounds)
        finally:
            templates.delete_all()


def main(argv: Sequence[str]) -> int:
    """Start installations, measure, remove them."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks")
    parser.add_argument("--rounds", type=int, default=40, help="measurements of each (default 40)")
    parser.add_argument("--burst", type=int, default=100, help="sandboxes at once (default 100)")
    parser.add_argument("--commands", type=int, default=10_000, help="to wear it (default 10,000)")
    parser.add_argument("--crowd", type=int, default=1000, help="sandboxes beside (default 1,000)")
    parser.add_argument("--gigabytes", type=float, default=5.0, help="of ballast (default 5)")
    parser.add_argument("--out", type=Path, help="a file for the tables")
    options = parser.parse_args(argv)
    report = Report()
    report.say(f"# What calls take\n\n{conditions()}")
    try:
        with mock.patch.dict(os.environ, {SETTING: "0"}), running_stack() as stack:
            calls.lift_limits(stack)
            title = "One client, no warm containers"
            calls.measure_alone(stack, report, title, options.rounds)
        with running_stack() as stack:
            calls.lift_limits(stack)
            measure_pooled(stack, report, options)
    finally:
        # What was measured until something failed is worth keeping, too.
        if options.out:
            options.out.write_text("\n".join(report.lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
