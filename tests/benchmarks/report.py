"""The page that benchmarks write: what was measured, under which conditions."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

HEAD = "| | n | median ms | p95 ms | × bwrap |\n|---|---:|---:|---:|---:|"


@dataclass
class Report:
    """What is printed as it is measured, and written at the end."""

    lines: list[str] = field(default_factory=list)
    # The median of bwrap(1) in the latest table that has it.
    reference: float | None = None

    def say(self, text: str) -> None:
        """Add some lines."""
        self.lines.append(text)
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def table(self, title: str, times: Mapping[str, Sequence[float]]) -> None:
        """Add a section with each contestant's times, given in milliseconds."""
        self.say(f"\n## {title}\n\n{HEAD}")
        if "bwrap" in times:
            self.reference = statistics.median(times["bwrap"])
        for name, values in times.items():
            median = statistics.median(values)
            p95 = statistics.quantiles(values, n=20, method="inclusive")[-1]
            ratio = f"{median / self.reference:.2f}" if self.reference else "–"
            self.say(f"| {name} | {len(values)} | {median:.1f} | {p95:.1f} | {ratio} |")


@dataclass(frozen=True)
class Row:
    """One contestant's times in milliseconds."""

    name: str
    times: Sequence[float]

    def text(self, reference: float) -> str:
        """A line of the table; the ratio is of medians, to ``reference``."""
        median = statistics.median(self.times)
        p95 = statistics.quantiles(self.times, n=20)[-1] if len(self.times) > 1 else median
        return (
            f"{self.name:<44}{len(self.times):>5}{median:>10.1f}{p95:>10.1f}"
            f"{median / reference:>8.2f}"
        )


def print_table(title: str, rows: Sequence[Row]) -> None:
    """The first row is what the others are compared with."""
    reference = statistics.median(rows[0].times)
    head = f"{'':<44}{'n':>5}{'median ms':>10}{'p95 ms':>10}{'ratio':>8}"
    lines = [f"\n{title}", head, *(row.text(reference) for row in rows)]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def milliseconds(action: Callable[[], object]) -> float:
    """How long ``action`` takes."""
    began = time.perf_counter()
    action()
    return (time.perf_counter() - began) * 1000


def conditions() -> str:
    """The machine, the moment and the code."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    version = subprocess.run(["git", "describe", "--always"], capture_output=True, text=True)
    return (
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, commit {version.stdout.strip()}, "
        f"{os.cpu_count()} × {model}, {memory:.0f} GiB, Linux {platform.release()}, "
        f"load {os.getloadavg()[0]:.1f} when it began."
    )
