"""How long to wait for something on a machine of any speed: it is followed, not timed.

A machine may be thirty times slower than the one a time limit was chosen on: emulated, shared,
under a quota.  So a limit here is a time *without progress* (:class:`Patience`): the processes that
are waited for use the CPU, want it and are not given it, or move data, and none of that counts.
What works for ever without an end is given up on at :data:`CEILING` times its limit.

Where nothing can be observed, a limit is multiplied by how slow the machine is (:func:`scaled`).
Limits that are promised to people (the time of a command, the grace after SIGTERM, a plan's) are
neither: those are clocks.
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

CEILING = 10
"""How many times its limit something may work without coming to an end (on an ordinary machine)."""
SLOWEST = 30.0
LONGEST_LOOK_SECONDS = 1.0
# Timers that go on in a program that hangs are no progress: less than a fiftieth of a CPU, or than
# so many bytes for each second of idleness.
_CPU_SHARE = 0.02
_BYTES_A_SECOND = 512
# What a loop of _measured takes on an ordinary machine; a fast one needs two thirds of it.
_ORDINARY_SECONDS = 0.001
_ROUNDS = 5
_LONGEST_MEASURE_SECONDS = 0.02
_TICKS = os.sysconf("SC_CLK_TCK")
_STATES = {
    **{"R": "is running", "S": "sleeps", "I": "sleeps", "D": "waits for the disk or the kernel"},
    **{"T": "is stopped", "t": "is being traced", "Z": "has ended"},
}

Pids = Callable[[], Iterable[int]]
Sign = Callable[[], object]


class Patience:
    """When to give up on something: after ``seconds`` in which it made no progress.

    ``pids`` are the processes that are waited for, asked for anew at each look; ``sign`` is
    anything else that changes with progress, such as the length of a log.  Poll :meth:`spent`, or
    wait inside ``async with``, which raises TimeoutError; :attr:`why` then says what was seen.
    """

    def __init__(
        self,
        seconds: float,
        pids: Pids = tuple,
        *,
        sign: Sign = tuple,
    ) -> None:
        self.why = ""
        self.pause = min(seconds / 5, LONGEST_LOOK_SECONDS)
        self._seconds = seconds
        self._most = CEILING * seconds * slowness()
        self._pids = pids
        self._sign = sign
        self._looked = time.monotonic()
        self._idle = self._total = 0.0
        self._work: Work | None = None
        self._signs: object = None

    def spent(self) -> bool:
        """Whether to give up now.  Cheap: it looks no more often than once in ``pause`` seconds."""
        now = time.monotonic()
        if not self.why and now - self._looked >= self.pause:
            # A look that comes late tells of us, or of a machine that was asleep.
            elapsed = min(now - self._looked, max(2 * self.pause, LONGEST_LOOK_SECONDS))
            self._looked = now
            self._look(elapsed)
        return bool(self.why)

    def _look(self, elapsed: float) -> None:
        work = Work.of(self._pids())
        signs = self._sign()
        self._total += elapsed
        if self._moved(work, signs, self._idle + elapsed):
            self._idle = 0.0
        elif not work.wants_cpu:
            self._idle += elapsed
        if self._idle == 0.0 or self._work is None:
            self._work, self._signs = work, signs
        if self._idle >= self._seconds:
            self.why = f"did nothing for {self._seconds:g} s{work.described()}"
        elif self._total >= self._most:
            self.why = f"was still at work after {self._total:.0f} s{work.described()}"

    def _moved(self, work: Work, signs: object, idle: float) -> bool:
        before = self._work
        if before is None:
            return False
        return (
            signs != self._signs
            # Fewer than before: one of them has ended.
            or work.cpu < before.cpu
            or work.cpu - before.cpu >= _CPU_SHARE * idle
            or work.moved - before.moved >= _BYTES_A_SECOND * idle
        )

    async def __aenter__(self) -> Self:
        self._limit = asyncio.timeout(None)
        await self._limit.__aenter__()
        self._timer = asyncio.get_running_loop().call_later(self.pause, self._look_again)
        return self

    def _look_again(self) -> None:
        loop = asyncio.get_running_loop()
        if self.spent():
            self._limit.reschedule(loop.time())
        else:
            self._timer = loop.call_later(self.pause, self._look_again)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._timer.cancel()
        await self._limit.__aexit__(kind, error, trace)


class Work:
    """What some processes have done so far: CPU seconds, and bytes read and written (proc(5))."""

    def __init__(self) -> None:
        self.cpu = 0.0
        self.moved = 0
        self.wants_cpu = False
        self._names: list[str] = []

    @classmethod
    def of(cls, pids: Iterable[int]) -> Work:
        """Look at processes; those that have ended are passed over."""
        work = cls()
        for pid in pids:
            try:
                work._add(Path(f"/proc/{pid}"))
            except (FileNotFoundError, ProcessLookupError):
                continue
        return work

    def _add(self, process: Path) -> None:
        name, _, rest = (process / "stat").read_text().partition("(")[2].rpartition(")")
        fields = rest.split()
        # utime, stime, and those of the children that were waited for.
        self.cpu += sum(map(int, fields[11:15])) / _TICKS
        self.moved += _moved(process / "io")
        states = [fields[0], *_thread_states(process)]
        self.wants_cpu |= "R" in states
        self._names.append(f"{name} ({process.name}) {_STATES.get(fields[0], fields[0])}")

    def described(self) -> str:
        """What the first few of them do now, to be put after a sentence."""
        return f" ({'; '.join(self._names[:3])})" if self._names else ""


def _moved(io: Path) -> int:
    try:
        lines = io.read_text().splitlines()
    except PermissionError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("rchar", "wchar")))


def _thread_states(process: Path) -> Iterator[str]:
    for thread in (process / "task").iterdir():
        if thread.name != process.name:
            yield (thread / "stat").read_text().rpartition(")")[2].split()[0]


def tree_of(pid: int, keep: Callable[[int], bool] = bool) -> list[int]:
    """A process and all it has started, but for what has detached itself; empty if it has ended.

    What ``keep`` does not want is left out, and what that has started.
    """
    found: list[int] = []
    left = [pid]
    while left:
        one = left.pop()
        if not keep(one):
            continue
        try:
            threads = list(Path(f"/proc/{one}/task").iterdir())
            for thread in threads:
                left += map(int, (thread / "children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):
            if not Path(f"/proc/{one}").exists():
                continue
        found.append(one)
    return found


def scaled(seconds: float) -> float:
    """A limit for what cannot be observed: longer by as much as the machine is slow."""
    return seconds * slowness()


@cache
def slowness() -> float:
    """How many times slower than an ordinary machine this one is; from 1 to :data:`SLOWEST`.

    ``ORKESTR_PATIENCE`` says so, or it is measured, once a process.
    """
    with contextlib.suppress(ValueError):
        if (named := named_slowness(os.environ)) is not None:
            return named
    return max(1.0, min(_measured() * _contention(), SLOWEST))


def named_slowness(environment: Mapping[str, str]) -> float | None:
    """What ``ORKESTR_PATIENCE`` says, None if nothing.  Raises ValueError if that is no number."""
    text = environment.get("ORKESTR_PATIENCE")
    if not text:
        return None
    try:
        wanted = float(text)
    except ValueError:
        wanted = 0.0
    if not 1 <= wanted <= 1000:
        raise ValueError(
            f"ORKESTR_PATIENCE is {text!r}: give a number from 1 to 1000, how many times slower "
            "than an ordinary machine this one is, or leave it unset to have it measured"
        )
    return wanted


def _measured() -> float:
    """How much CPU time a fixed piece of work takes, beside what it takes elsewhere."""
    began = time.monotonic()
    taken: list[float] = []
    while len(taken) < _ROUNDS and time.monotonic() - began < _LONGEST_MEASURE_SECONDS:
        before, total = time.thread_time(), 0
        for number in range(10_000):
            total += number * number
        taken.append(time.thread_time() - before)
    return min(taken) / _ORDINARY_SECONDS


def _contention() -> float:
    """How long this process has taken to get its CPU time, beside that time: its life so far.

    schedstat is "time spent on the cpu" and "time spent waiting on a runqueue", in nanoseconds
    (sched-stats.rst of the kernel); under a quota the time without is waiting, too.
    """
    try:
        ran, waited = map(int, Path("/proc/self/schedstat").read_text().split()[:2])
    except (OSError, ValueError):
        return 1.0
    return (ran + waited) / ran if ran else 1.0
