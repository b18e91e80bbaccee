"""What a sandbox has used, as figures for its page."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, pairwise

from orkestr_console.ui.lines import Period, area
from orkestr_console.ui.templatetags.console import size
from sandboxes_app.services import Metrics

SHOWN_SECONDS = 86_400
# A chart of less would be a few bars.
MIN_SECONDS = 600.0


@dataclass(frozen=True)
class Figure:
    """One chart: its name, its area, and in words how much of how much is in use now."""

    title: str
    area: str
    words: str


@dataclass(frozen=True)
class Use:
    """What the page shows; ``since`` is where its charts begin, in Unix seconds.

    ``sent`` and ``received`` are bytes over the sandbox's life, None if they aren't known any more.
    """

    since: float
    figures: tuple[Figure, ...]
    disk: int | None
    sent: int | None
    received: int | None


def describe_use(metrics: Metrics) -> Use | None:
    """The figures of a sandbox's last day; None if nothing was measured."""
    cpus, memory = _periods(metrics)
    if not cpus:
        return None
    end = cpus[-1][1]
    start = min(cpus[0][0], end - MIN_SECONDS)
    sandbox, measured = metrics.sandbox, metrics.measured
    live = measured if sandbox.is_running else None
    limit = float(sandbox.memory_mb * 1024 * 1024)
    cpu_now = f"{cpus[-1][2]:.2f} of {sandbox.cpu:g} CPUs" if live else ""
    memory_now = f"{size(live.memory_bytes)} of {size(round(limit))}" if live else ""
    return Use(
        start,
        (
            Figure("CPU", area(cpus, start, end, sandbox.cpu), cpu_now),
            Figure("Memory", area(memory, start, end, limit), memory_now),
        ),
        measured.disk_bytes if measured else _last_disk(metrics),
        measured.sent_bytes if measured else None,
        measured.received_bytes if measured else None,
    )


def _periods(metrics: Metrics) -> tuple[list[Period], list[Period]]:
    """The CPUs and the memory in use, by time."""
    samples = metrics.measured.samples if metrics.measured else ()
    until = samples[0].at if samples else float("inf")
    points = [point for point in metrics.points if point.at < until]
    cpus: list[Period] = [
        (one.at - one.seconds, one.at, one.cpu_seconds / one.seconds) for one in points
    ]
    memory: list[Period] = [(one.at - one.seconds, one.at, one.memory_bytes) for one in points]
    for before, sample in pairwise(chain(samples[:1], samples)):
        if sample.at > before.at:
            cpus.append((before.at, sample.at, sample.cpu_cores))
            memory.append((before.at, sample.at, sample.memory_bytes))
    return cpus, memory


def _last_disk(metrics: Metrics) -> int | None:
    known = (one.disk_bytes for one in reversed(metrics.points) if one.disk_bytes is not None)
    return next(known, None)
