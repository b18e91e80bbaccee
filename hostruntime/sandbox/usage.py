"""Each sandbox's usage: CPU-seconds and GB-seconds by day, stored until collected.

Both come from the sandbox's control group.  The kernel counts the CPU time; memory is read every
two seconds, and the mean of two readings times the time between them is added up (1 GB = 10⁹
bytes; what the kernel charges to the group, including files in /tmp and /workspace and the page
cache).

A sandbox has a small file in ``usage/`` with its sums and the last reading.  It outlives the
sandbox until the collector acknowledges it, so neither a killed agent nor an absent collector loses
anything; time without an agent is made up for at the next reading.  The sums only ever grow:
collecting twice returns the same numbers, not twice as much.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict, TypeAdapter

from hostruntime.container.cgroups import ContainerGroups, CounterFiles
from hostruntime.host.days import split_by_day
from hostruntime.host.paths import write_json
from hostruntime.host.records import STRICT, BadRecord, read_record
from hostruntime.host.tasks import KeyedLocks, cancel_and_wait, every, in_thread, log_errors
from hostruntime.image.quarantine import Quarantine
from hostruntime.sandbox.history import Gauges, Histories
from hostruntime.sandbox.metrics import MAX_INTERVAL, Windows
from hostruntime.wire.sandboxes import (
    DailyUsage,
    MetricsHistory,
    ResourceUsage,
    SandboxMetrics,
    UsageInfo,
)

SAMPLE_SECONDS = 2.0
SAVE_SECONDS = 10.0
# Each save writes a file; the rest wait for the next sample.
MAX_SAVES_PER_SAMPLE = 25
# Limits of uncollected meters.
KEEP_ENDED_SECONDS = 30 * 86_400.0
MAX_ENDED = 20_000
# Older days are combined into one sum.
MAX_DAYS = 40
SWEEP_SECONDS = 600.0
_GB = 1e9
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reading:
    """The counters at one moment: ``at`` is CLOCK_MONOTONIC (clock_gettime(2)), in seconds."""

    at: float
    cpu_us: int
    memory_bytes: int


@dataclass
class Meter:
    """The sums of one sandbox; ``days`` maps ISO dates to ``[cpu_seconds, gb_seconds]``.

    ``read_at`` is CLOCK_MONOTONIC, which is comparable between successive agents: a container does
    not outlive the machine's boot.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    id: str
    read_at: float
    cpu_us: int = 0
    memory_bytes: int | None = None
    before: list[float] = field(default_factory=lambda: [0.0, 0.0])
    days: dict[str, list[float]] = field(default_factory=dict)
    ended_at: float | None = None
    saved_at: float = 0.0

    def add(self, reading: Reading, now: float) -> None:
        """Add the usage since the last reading; ``now`` is the reading's Unix time."""
        seconds = reading.at - self.read_at
        if seconds <= 0 or self.ended_at is not None:
            return
        previous = reading.memory_bytes if self.memory_bytes is None else self.memory_bytes
        gb_seconds = (previous + reading.memory_bytes) / 2 * seconds / _GB
        cpu_seconds = max(reading.cpu_us - self.cpu_us, 0) / 1e6
        for day, share in split_by_day(now - seconds, now):
            sums = self.days.setdefault(day.isoformat(), [0.0, 0.0])
            sums[0] += cpu_seconds * share
            sums[1] += gb_seconds * share
        self.read_at, self.cpu_us = reading.at, max(reading.cpu_us, self.cpu_us)
        self.memory_bytes = reading.memory_bytes
        self._fold()

    def _fold(self) -> None:
        for day in sorted(self.days)[:-MAX_DAYS] if len(self.days) > MAX_DAYS else ():
            sums = self.days.pop(day)
            self.before = [total + part for total, part in zip(self.before, sums, strict=True)]

    def info(self) -> UsageInfo:
        """The usage as the agent's API returns it."""
        days = tuple(
            DailyUsage(*sums, day=date.fromisoformat(day))
            for day, sums in sorted(self.days.items())
        )
        return UsageInfo(self.id, self.ended_at is not None, ResourceUsage(*self.before), days)


_METER = TypeAdapter(Meter)
Meters = list[Meter]


def read_meter(path: Path) -> Meter | None:
    """Read the meter in a file; None if it does not exist.  Raises BadRecord."""
    meter = read_record(path, _METER)
    if meter is None:
        return None
    if meter.id != path.stem:
        raise BadRecord(path, f"it is the record of {meter.id[:100]!r}")
    if any(len(sums) != 2 for sums in (meter.before, *meter.days.values())):
        raise BadRecord(path, "its sums are not two numbers each")
    for day in meter.days:
        try:
            date.fromisoformat(day)
        except ValueError as error:
            raise BadRecord(path, f"{day[:20]!r} is not a date") from error
    return meter


@dataclass
class UsageStore:
    """The meters of one host's sandboxes.  For use on one event loop; call :meth:`recover` first.

    ``groups`` returns the control groups of a sandbox by its id; damaged records go to
    ``quarantine``.  ``gauges`` reads what is not in a control group, and blocks; ``is_paused``
    doesn't.
    """

    directory: Path
    groups: Callable[[str], ContainerGroups]
    quarantine: Quarantine
    gauges: Callable[[str], Gauges] = lambda _: Gauges()
    is_paused: Callable[[str], bool] = lambda _: False
    history: Histories = field(init=False)
    _meters: dict[str, Meter] = field(default_factory=dict)
    _windows: Windows = field(default_factory=Windows)
    _sampler: asyncio.Task[None] | None = None
    # Only one thread at a time writes a file, so that the last write has the latest sums.
    _files: KeyedLocks = field(default_factory=KeyedLocks)
    _counters: dict[str, CounterFiles] = field(default_factory=dict)
    _swept_at: float = float("-inf")

    def __post_init__(self) -> None:
        self.history = Histories(self.directory, self.gauges)

    def recover(self, running: Mapping[str, float]) -> None:
        """Load the sums; sandboxes not in ``running`` (id → Unix time of start) have ended.

        Blocks: call it in a thread, before anything else.
        """
        for path in sorted(self.directory.glob("*.json")):
            try:
                meter = read_meter(path)
            except BadRecord as error:
                self.quarantine.add_damaged(path, "usage", error.detail)
                continue
            if meter is None:
                continue
            self._meters[meter.id] = meter
            if meter.ended_at is None and meter.id not in running:
                meter.ended_at = time.time()
                self._write([meter])
        for sandbox_id, started_at in running.items():
            if sandbox_id not in self._meters:
                self.start(sandbox_id, started_at)
        self.history.recover(running)
        for meter in self._excess_meters():
            self._unlink(meter)

    def start_sampling(self) -> None:
        """Start sampling every two seconds."""
        description = "the usage of sandboxes could not be read"
        self._sampler = every(SAMPLE_SECONDS, self._sample, description)

    async def close(self) -> None:
        """Stop sampling; save everything."""
        await cancel_and_wait(self._sampler)
        await self._write_points(everything=True)
        await self._save(*self._running())

    # Sandbox lifecycle ---------------------------------------------------------------------

    def start(self, sandbox_id: str, started_at: float, cpu_us: int = 0) -> None:
        """Start the meter of a sandbox started at ``started_at`` (Unix seconds); no I/O yet.

        ``cpu_us`` is what its container had used before it was the sandbox's.
        """
        meter = self._meters.setdefault(sandbox_id, Meter(sandbox_id, 0.0))
        meter.read_at = time.monotonic() - max(time.time() - started_at, 0.0)
        meter.cpu_us, meter.memory_bytes, meter.ended_at = cpu_us, None, None
        meter.saved_at = time.monotonic()
        self._counters.pop(sandbox_id, None)
        self.history.start(sandbox_id)

    def read(self, sandbox_id: str) -> None:
        """Read a sandbox's counters now; call it before a stop, which removes them."""
        self._apply(self._readings([sandbox_id]))

    async def finish(self, sandbox_id: str) -> None:
        """Finalise the sums of a sandbox that has ended; they are stored until collected."""
        meter = self._meters.get(sandbox_id)
        if meter is not None and meter.ended_at is None:
            meter.ended_at = time.time()
            self._windows.forget(sandbox_id)
            self._counters.pop(sandbox_id, None)
            await self._save(meter)
            if (partial := self.history.end(sandbox_id)) is not None:
                with log_errors(f"the history of sandbox {sandbox_id} could not be closed"):
                    await in_thread(self.history.close_file, partial)

    async def metrics(self, sandbox_id: str) -> SandboxMetrics:
        """What a running sandbox uses, and has used lately."""
        memory, gauges = await in_thread(self._measure, sandbox_id)
        meter = self._meters.get(sandbox_id)
        total = meter.info().total if meter is not None else ResourceUsage()
        sent, received = gauges.traffic or (None, None)
        samples, disk = self._windows.of(sandbox_id), gauges.disk_bytes
        return SandboxMetrics(sandbox_id, memory, total, samples, disk, sent, received)

    def _measure(self, sandbox_id: str) -> tuple[int | None, Gauges]:
        return self.groups(sandbox_id).working_set_bytes(), self.gauges(sandbox_id)

    async def points(self, sandbox_id: str, since: float) -> MetricsHistory:
        """What a sandbox has used over its life, also one that ended within the last day."""
        return MetricsHistory(tuple(await in_thread(self.history.read, sandbox_id, since)))

    # Collection ----------------------------------------------------------------------------

    def list(self, only: str | None = None) -> list[Meter]:
        """The meters of running sandboxes and of ended ones not yet collected."""
        return [meter for meter in self._meters.values() if only in (None, meter.id)]

    def info(self, sandbox_id: str) -> UsageInfo | None:
        """The usage of one sandbox; None if it is not known (any more)."""
        meter = self._meters.get(sandbox_id)
        return meter.info() if meter is not None else None

    async def forget_collected(self, ids: Iterable[str]) -> None:
        """Delete those of these meters whose sandboxes have ended.  Raises OSError."""
        for sandbox_id in ids:
            meter = self._meters.get(sandbox_id)
            if meter is not None and meter.ended_at is not None:
                await self._forget(meter)

    async def forget_if_possible(self, ids: Iterable[str]) -> None:
        """Like :meth:`forget_collected`; what cannot be deleted is collected again."""
        with log_errors("the usage of ended sandboxes could not be deleted"):
            await self.forget_collected(ids)

    # Pieces --------------------------------------------------------------------------------

    async def _sample(self) -> None:
        running = [meter.id for meter in self._running()]
        self._apply(await asyncio.to_thread(self._readings, running))
        await self._write_points()
        await self._save_old()
        for meter in self._excess_meters():
            await self._forget(meter)

    async def _write_points(self, *, everything: bool = False) -> None:
        # A full disk must not stop what follows; those points are lost.
        with log_errors("the history of sandboxes could not be written"):
            if points := self.history.take_due(everything=everything):
                await asyncio.to_thread(self.history.write, points)
            if time.monotonic() - self._swept_at > SWEEP_SECONDS:
                self._swept_at = time.monotonic()
                running = {meter.id for meter in self._running()}
                await asyncio.to_thread(self.history.sweep, running)

    def _running(self) -> Iterable[Meter]:
        return [meter for meter in self._meters.values() if meter.ended_at is None]

    def _readings(self, ids: Iterable[str]) -> dict[str, Reading]:
        readings: dict[str, Reading] = {}
        for sandbox_id in ids:
            files = self._counters.get(sandbox_id)
            if files is None:
                files = self._counters[sandbox_id] = self.groups(sandbox_id).counter_files()
            if (counters := files.read()) is not None:
                readings[sandbox_id] = Reading(time.monotonic(), *counters)
        return readings

    def _apply(self, readings: Mapping[str, Reading]) -> None:
        offset = time.time() - time.monotonic()
        for sandbox_id, reading in readings.items():
            meter = self._meters.get(sandbox_id)
            if meter is not None and meter.ended_at is None:
                seconds, cpu_us = reading.at - meter.read_at, reading.cpu_us - meter.cpu_us
                at = reading.at + offset
                self._windows.add(sandbox_id, at, seconds, cpu_us / 1e6, reading.memory_bytes)
                if self.is_paused(sandbox_id):
                    self.history.cut(sandbox_id)
                elif seconds <= MAX_INTERVAL:
                    self.history.add(
                        sandbox_id, at, seconds, max(cpu_us, 0) / 1e6, reading.memory_bytes
                    )
                meter.add(reading, at)

    async def _save_old(self) -> None:
        cutoff = time.monotonic() - SAVE_SECONDS
        old = [meter for meter in self._running() if meter.saved_at <= cutoff]
        old.sort(key=lambda meter: meter.saved_at)
        await self._save(*old[:MAX_SAVES_PER_SAMPLE])

    async def _save(self, *meters: Meter) -> None:
        """Write these meters, in one thread: to hand a file to one takes as long as to write it."""
        async with AsyncExitStack() as held:
            for meter in meters:
                await held.enter_async_context(self._files.holding(meter.id))
            # They may have been collected meanwhile.
            current = [meter for meter in meters if self._meters.get(meter.id) is meter]
            if current:
                await in_thread(self._write, current)

    def _write(self, meters: Iterable[Meter]) -> None:
        for meter in meters:
            meter.saved_at = time.monotonic()
            # A full disk must not prevent a sandbox from ending; the sums are still in memory.
            with log_errors(f"the usage of sandbox {meter.id} could not be saved"):
                # Not asdict, which copies each part of it.
                write_json(self._path(meter.id), vars(meter))

    def _excess_meters(self) -> Meters:
        """Uncollected meters that are too old, or too many."""
        ended = [meter for meter in self._meters.values() if meter.ended_at is not None]
        ended.sort(key=lambda meter: meter.ended_at or 0.0, reverse=True)
        oldest = time.time() - KEEP_ENDED_SECONDS
        surplus = [
            meter
            for index, meter in enumerate(ended)
            if index >= MAX_ENDED or (meter.ended_at or 0.0) < oldest
        ]
        for meter in surplus:
            _log.error("discarding the uncollected usage of sandbox %s", meter.id)
        return surplus

    async def _forget(self, meter: Meter) -> None:
        async with self._files.holding(meter.id):
            await in_thread(self._unlink, meter)

    def _unlink(self, meter: Meter) -> None:
        self._path(meter.id).unlink(missing_ok=True)
        self._meters.pop(meter.id, None)

    def _path(self, sandbox_id: str) -> Path:
        return self.directory / f"{sandbox_id}.json"
