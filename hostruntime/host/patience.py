"""Timeouts that suit a machine of any speed: they watch progress instead of the clock.

A machine may be thirty times slower than the one a timeout was chosen on: emulated, shared, under
a quota.  So a timeout here is a time *without progress* (:class:`Patience`): while the processes
waited for use the CPU, wait for it, or move data, no time is counted.  A process that works on
without finishing is given up on after :data:`MAX_EXTENSION` times the timeout.

Where nothing can be observed, a timeout is multiplied by how slow the machine is (:func:`scaled`).
Limits that are promised to people (a command's time limit, the grace period after SIGTERM, a
plan's limits) are neither: those follow the clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Self

MAX_EXTENSION = 10
"""How many times its timeout something may work without finishing (on an ordinary machine)."""
MAX_SLOWNESS = 30.0
MAX_POLL_SECONDS = 1.0
# Timers that keep firing in a hung program are not progress: less than a fiftieth of a CPU, or
# fewer than this many bytes for each idle second.
_MIN_CPU_SHARE = 0.02
_MIN_BYTES_PER_SECOND = 512
# The duration of a round of _measured_slowness on an ordinary machine; a fast one needs two thirds.
_REFERENCE_SECONDS = 0.001
_ROUNDS = 5
_MAX_MEASURE_SECONDS = 0.02
_TICKS = os.sysconf("SC_CLK_TCK")
_STATES = {
    **{"R": "is running", "S": "sleeps", "I": "sleeps", "D": "waits for the disk or the kernel"},
    **{"T": "is stopped", "t": "is being traced", "Z": "has exited"},
}

Pids = Callable[[], Iterable[int]]
Marker = Callable[[], object]


class Patience:
    """A timeout that expires after ``seconds`` without progress.

    ``pids`` returns the processes that are waited for, and is called at each check; ``marker``
    returns anything else that changes with progress, such as the length of a log.  Poll
    :meth:`exhausted`, or wait inside ``async with``, which raises TimeoutError; :attr:`reason` then
    says what was observed.
    """

    def __init__(
        self,
        seconds: float,
        pids: Pids = tuple,
        *,
        marker: Marker = tuple,
    ) -> None:
        self.reason = ""
        self.poll_interval = min(seconds / 5, MAX_POLL_SECONDS)
        self._seconds = seconds
        self._total_limit = MAX_EXTENSION * seconds * slowness()
        self._pids = pids
        self._marker = marker
        self._last_check = time.monotonic()
        self._idle = self._total = 0.0
        self._activity: ProcessActivity | None = None
        self._marker_value: object = None

    def exhausted(self) -> bool:
        """Whether to give up now.  Cheap: checks at most once every ``poll_interval`` seconds."""
        now = time.monotonic()
        if not self.reason and now - self._last_check >= self.poll_interval:
            # A late check means that we were delayed, or that the machine was asleep.
            elapsed = min(now - self._last_check, max(2 * self.poll_interval, MAX_POLL_SECONDS))
            self._last_check = now
            self._check(elapsed)
        return bool(self.reason)

    def _check(self, elapsed: float) -> None:
        activity = ProcessActivity.measure(self._pids())
        marker_value = self._marker()
        self._total += elapsed
        if self._made_progress(activity, marker_value, self._idle + elapsed):
            self._idle = 0.0
        elif not activity.has_runnable:
            self._idle += elapsed
        if self._idle == 0.0 or self._activity is None:
            self._activity, self._marker_value = activity, marker_value
        if self._idle >= self._seconds:
            self.reason = f"did nothing for {self._seconds:g} s{activity.description()}"
        elif self._total >= self._total_limit:
            self.reason = f"was still at work after {self._total:.0f} s{activity.description()}"

    def _made_progress(self, activity: ProcessActivity, marker_value: object, idle: float) -> bool:
        previous = self._activity
        if previous is None:
            return False
        return (
            marker_value != self._marker_value
            # Less than before: one of the processes has exited.
            or activity.cpu < previous.cpu
            or activity.cpu - previous.cpu >= _MIN_CPU_SHARE * idle
            or activity.io_bytes - previous.io_bytes >= _MIN_BYTES_PER_SECOND * idle
        )

    async def __aenter__(self) -> Self:
        self._limit = asyncio.timeout(None)
        await self._limit.__aenter__()
        self._timer = asyncio.get_running_loop().call_later(
            self.poll_interval, self._check_and_reschedule
        )
        return self

    def _check_and_reschedule(self) -> None:
        loop = asyncio.get_running_loop()
        if self.exhausted():
            self._limit.reschedule(loop.time())
        else:
            self._timer = loop.call_later(self.poll_interval, self._check_and_reschedule)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._timer.cancel()
        await self._limit.__aexit__(kind, error, trace)


class ProcessActivity:
    """Resource use of some processes so far: CPU seconds, bytes read and written (proc(5))."""

    def __init__(self) -> None:
        self.cpu = 0.0
        self.io_bytes = 0
        self.has_runnable = False
        self._names: list[str] = []

    @classmethod
    def measure(cls, pids: Iterable[int]) -> ProcessActivity:
        """Measure these processes; those that have exited are skipped."""
        activity = cls()
        for pid in pids:
            try:
                activity._add(Path(f"/proc/{pid}"))
            except (FileNotFoundError, ProcessLookupError):
                continue
        return activity

    def _add(self, process: Path) -> None:
        name, _, remainder = (process / "stat").read_text().partition("(")[2].rpartition(")")
        fields = remainder.split()
        # utime, stime, and those of the reaped children.
        self.cpu += sum(map(int, fields[11:15])) / _TICKS
        self.io_bytes += _io_bytes(process / "io")
        states = [fields[0], *_thread_states(process)]
        self.has_runnable |= "R" in states
        self._names.append(f"{name} ({process.name}) {_STATES.get(fields[0], fields[0])}")

    def description(self) -> str:
        """The current states of the first few processes, to append to a sentence."""
        return f" ({'; '.join(self._names[:3])})" if self._names else ""


def _io_bytes(io: Path) -> int:
    try:
        lines = io.read_text().splitlines()
    except PermissionError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("rchar", "wchar")))


def _thread_states(process: Path) -> Iterator[str]:
    for thread in (process / "task").iterdir():
        if thread.name != process.name:
            yield (thread / "stat").read_text().rpartition(")")[2].split()[0]


def process_tree(pid: int, include: Callable[[int], bool] = bool) -> list[int]:
    """A process and its descendants, except those that detached; empty if it has exited.

    A process that ``include`` rejects is left out, with its descendants.
    """
    pids: list[int] = []
    pending = [pid]
    while pending:
        current = pending.pop()
        if not include(current):
            continue
        try:
            threads = list(Path(f"/proc/{current}/task").iterdir())
            for thread in threads:
                pending += map(int, (thread / "children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):
            if not Path(f"/proc/{current}").exists():
                continue
        pids.append(current)
    return pids


def scaled(seconds: float) -> float:
    """Scale a timeout for something that cannot be observed by how slow the machine is."""
    return seconds * slowness()


@cache
def slowness() -> float:
    """How many times slower than an ordinary machine this one is: 1 to :data:`MAX_SLOWNESS`.

    Set by ``ORKESTR_PATIENCE``, or measured once per process.
    """
    with contextlib.suppress(ValueError):
        if (configured := configured_slowness(os.environ)) is not None:
            return configured
    return max(1.0, min(_measured_slowness() * _contention(), MAX_SLOWNESS))


def configured_slowness(environment: Mapping[str, str]) -> float | None:
    """The value of ``ORKESTR_PATIENCE``, None if unset.  Raises ValueError if it is invalid."""
    text = environment.get("ORKESTR_PATIENCE")
    if not text:
        return None
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 1 <= factor <= 1000:
        raise ValueError(
            f"ORKESTR_PATIENCE is {text!r}: give a number from 1 to 1000, how many times slower "
            "than an ordinary machine this one is, or leave it unset to have it measured"
        )
    return factor


def _measured_slowness() -> float:
    """The CPU time of a fixed amount of work, relative to an ordinary machine."""
    start = time.monotonic()
    durations: list[float] = []
    while len(durations) < _ROUNDS and time.monotonic() - start < _MAX_MEASURE_SECONDS:
        before, total = time.thread_time(), 0
        for number in range(10_000):
            total += number * number
        durations.append(time.thread_time() - before)
    return min(durations) / _REFERENCE_SECONDS


def _contention() -> float:
    """The run time plus the wait time of this process so far, relative to the run time.

    schedstat is "time spent on the cpu" and "time spent waiting on a runqueue", in nanoseconds
    (the kernel's sched-stats.rst); time throttled by a quota counts as waiting, too.
    """
    try:
        running, waiting = map(int, Path("/proc/self/schedstat").read_text().split()[:2])
    except (OSError, ValueError):
        return 1.0
    return (running + waiting) / running if running else 1.0
