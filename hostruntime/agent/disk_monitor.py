"""Keeps tenants from using the disk's reserve (:mod:`hostruntime.host.disk_space`).

The file system is checked every second, and more often the less space there is.  Unwritten data of
tenants' disks, which will be written even if they are frozen, counts as used.

Below the reserve nothing new is started, layers are deleted, and containers that have written in
the last seconds are held: they are frozen as in a pause, and continue once the free space exceeds
the reserve by a quarter.  Freezing does not interrupt a write(2) in the kernel (signal(7)), nor
the writeback of cached data.  So once half of the reserve is used, the container that has grown
most since the space ran short is terminated, with a reason; then the next.  Containers that have
not written keep running, and are not terminated for what others did: that would free little, and
stop nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import time
from collections import Counter, deque
from collections.abc import Coroutine, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from hostruntime.agent.ballast import Ballast
from hostruntime.container.disk import DiskSize
from hostruntime.container.manager import ContainerManager
from hostruntime.errors import ContainerGone, HostFull, HostUnavailable
from hostruntime.host.disk_space import DiskSpace, Level
from hostruntime.host.patience import scaled
from hostruntime.host.tasks import every, in_background
from hostruntime.wire.health import DiskStatus

_GIB, _MIB = 1024**3, 1024**2
# This far above the reserve, checking every second suffices: few disks write more in a second.
_FAR_BYTES, _NEAR_BYTES = 8 * _GIB, 1 * _GIB
_FAR_SECONDS, _NEAR_SECONDS = 1.0, 0.2
# While somebody writes: a disk's cache can absorb gigabytes per second.
_NEAR_WRITING_SECONDS = 0.03
# Recent growth is what was written within this time.
_WINDOW_SECONDS = 5.0
# Containers that write less than this in that time keep running (low and critical level).
_HEAVY_WRITER_BYTES, _CRITICAL_WRITER_BYTES = 1 * _MIB, 64 * 1024
# Free space, as a multiple of the reserve, above which the level is normal again (hysteresis).
RECOVERED_ABOVE = 1.25
_RELIEF_SECONDS = 10.0
# The time between two test writes.
_WRITE_PROBE_SECONDS = 5.0
# A container that has written less than this fraction of the reserve is not terminated: it would
# not help.
_MIN_GROWTH_SHARE = 64
# How long the level must stay critical although writers are frozen.
_CRITICAL_GRACE_SECONDS = 0.5
# How long to wait for a terminated container to free its space before terminating the next.
_TERMINATION_SECONDS = 5.0
# The space of a terminated container is free after this time at the latest.
_SETTLE_SECONDS = 1.0
HELD_MESSAGE = (
    "The machine is low on disk space and this sandbox was writing to its disk, so it is frozen "
    "until there is space again. It then resumes by itself. Nothing is lost; try again later."
)
_log = logging.getLogger(__name__)


class SpaceRelief(Protocol):
    """What the monitor needs from its host."""

    def free_space(self) -> Coroutine[Any, Any, None]:
        """Abort what uses more space, and delete what can be created again."""

    def terminate_for_space(self, owner: str) -> Coroutine[Any, Any, None]:
        """Terminate an owner's container and record why."""

    def is_build(self, owner: str) -> bool:
        """Whether an owner is a build."""

    def volume_sizes(self) -> Mapping[str, DiskSize]:
        """What attached volumes take, by their owner."""

    def capturing(self) -> list[str]:
        """The builds that write without a container; newest last."""


@dataclass
class Growth:
    """How much each disk has grown recently, and since space ran short."""

    _samples: deque[tuple[float, Mapping[str, int]]] = field(default_factory=deque)
    _since_short: Counter[str] = field(default_factory=Counter)

    def record(self, sizes: Mapping[str, int]) -> None:
        """Record the current sizes of all disks, in bytes."""
        now = time.monotonic()
        while len(self._samples) > 1 and self._samples[1][0] <= now - _WINDOW_SECONDS:
            self._samples.popleft()
        self._samples.append((now, sizes))
        for owner, grown in self.recent().items():
            self._since_short[owner] = max(self._since_short[owner], grown)

    def recent(self) -> dict[str, int]:
        """The growth of each disk within the last seconds, in bytes."""
        if not self._samples:
            return {}
        (_, earlier), (_, current) = self._samples[0], self._samples[-1]
        return {owner: size - earlier.get(owner, 0) for owner, size in current.items()}

    def largest(self, minimum: int) -> list[str]:
        """Owners whose disk exists and has grown by ``minimum`` bytes since space ran short."""
        current = self._samples[-1][1] if self._samples else {}
        candidates = self._since_short.most_common()
        return [owner for owner, grown in candidates if grown >= minimum and owner in current]

    def reset(self) -> None:
        """Forget the growth since space ran short."""
        self._since_short.clear()


@dataclass
class DiskMonitor:
    """Monitors the file system of a state directory.  For use on one event loop."""

    root: Path
    containers: ContainerManager
    ballast: Ballast
    relief: SpaceRelief
    level: Level = Level.NORMAL
    _space: DiskSpace | None = None
    _problem: str | None = None
    _growth: Growth = field(default_factory=Growth)
    _probed_at: float = -_WRITE_PROBE_SECONDS
    _writable: bool = True
    _relieved_at: float = -_RELIEF_SECONDS
    # Owners terminated since space ran short, and when the next may be.
    _terminated: set[str] = field(default_factory=set)
    _next_termination: float = 0.0
    _critical_since: float = math.inf
    _tasks: dict[tuple[str, str], asyncio.Task[None]] = field(default_factory=dict)
    # A separate thread: the shared ones may all be waiting for the disk.
    _measure_thread: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="room")
    )
    # Changes wait for the file system's journal, which heavy writers may block.
    _ballast_thread: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="ballast")
    )
    _ballast_work: Future[None] | None = None

    def start(self) -> asyncio.Task[None]:
        """Monitor until the task is cancelled; then call :meth:`close`."""
        description = "the disk space could not be checked"
        return every(self._interval, self.check, description, immediately=True)

    def close(self) -> None:
        """Cancel pending work, without waiting for the disk."""
        self._measure_thread.shutdown(wait=False)
        self._ballast_thread.shutdown(wait=False)
        for task in self._tasks.values():
            task.cancel()

    async def check(self) -> None:
        """Check once, and act on the result.  Raises HostError, OSError."""
        loop = asyncio.get_running_loop()
        near_reserve = self._space is None or self._bytes_above_reserve() < _FAR_BYTES
        space, sizes = await loop.run_in_executor(self._measure_thread, self._measure, near_reserve)
        self._space = space
        if self._ballast_work is None or self._ballast_work.done():
            self._ballast_work = self._ballast_thread.submit(self._maintain_ballast, space)
        if near_reserve:
            self._growth.record({owner: size.when_written for owner, size in sizes.items()})
        else:
            self._growth = Growth()
        self._update_level(space)
        if self.level in (Level.LOW, Level.CRITICAL):
            self._relieve(space)
        elif self.level is Level.NORMAL:
            self._growth.reset()
            self._terminated.clear()
            self._critical_since = math.inf
            self._release_held()

    def notes(self) -> list[str]:
        """Sentences on what is wrong."""
        held = len(self.containers.held())
        suffix = f" {held} sandboxes and builds are frozen until there is space." if held else ""
        return [self._problem + suffix] if self._problem else []

    def status(self) -> DiskStatus:
        """For the agent's health response."""
        status = DiskStatus(
            level=self.level.wire_name,
            held=len(self.containers.held()),
            ballast=self.ballast.is_allocated,
        )
        if self._space is None:
            return status
        return replace(
            status,
            size_bytes=self._space.size_bytes,
            free_bytes=self._space.free_bytes,
            reserve_bytes=self._space.reserve_bytes,
            free_files=self._space.free_files,
            reserve_files=self._space.reserve_files,
        )

    # Pieces --------------------------------------------------------------------------------

    def _measure(self, near_reserve: bool) -> tuple[DiskSpace, Mapping[str, DiskSize]]:
        """Called in a thread, as a hanging disk blocks the caller."""
        space = DiskSpace.of(self.root)
        space = replace(space, read_only=space.read_only or not self._writable)
        sizes = self._sizes() if near_reserve else {}
        unwritten = sum(size.unwritten for size in sizes.values())
        if unwritten:
            # A disk may have reserved blocks that will never be written (fallocate(2)).
            space = space.after_writing(min(unwritten, dirty_bytes()))
        return space, sizes

    def _sizes(self) -> Mapping[str, DiskSize]:
        """What each container's disk takes, and the volume that it has."""
        sizes = self.containers.disks.sizes()
        for owner, volume in self.relief.volume_sizes().items():
            sizes[owner] = sizes.get(owner, DiskSize(0, 0)) + volume
        return sizes

    def _maintain_ballast(self, space: DiskSpace) -> None:
        """Probe whether the disk is writable and balance the ballast; called in its own thread."""
        if time.monotonic() > self._probed_at + _WRITE_PROBE_SECONDS:
            self._probed_at = time.monotonic()
            self._writable = can_write(self.root)
        try:
            self.ballast.balance(space)
        except OSError as error:
            _log.error("the ballast could not be adjusted: %s", error)

    def _bytes_above_reserve(self) -> int:
        assert self._space is not None
        return self._space.free_bytes - self._space.reserve_bytes

    def _interval(self) -> float:
        if (
            self._space is None
            or not self.containers.running()
            or self._bytes_above_reserve() > _FAR_BYTES
        ):
            return _FAR_SECONDS
        writing = max(self._growth.recent().values(), default=0) >= _HEAVY_WRITER_BYTES
        return (
            _NEAR_WRITING_SECONDS
            if writing and self._bytes_above_reserve() < _NEAR_BYTES
            else _NEAR_SECONDS
        )

    def _update_level(self, space: DiskSpace) -> None:
        level = space.level
        if level is Level.NORMAL and self.level in (Level.LOW, Level.CRITICAL):
            # Hysteresis: not as soon as somebody deletes a block.
            level = Level.NORMAL if space.free_ratio >= RECOVERED_ABOVE else Level.LOW
        self._problem = problem = None if level is Level.NORMAL else space.problem or self._problem
        error = HostUnavailable if space.read_only else HostFull
        self.containers.disks.refusal = None if problem is None else partial(error, problem)
        if level is not self.level:
            worse = level > self.level
            (_log.error if worse else _log.warning)(
                "%s", self._problem or "there is enough disk space again"
            )
        self.level = level

    def _relieve(self, space: DiskSpace) -> None:
        if time.monotonic() > self._relieved_at + _RELIEF_SECONDS:
            self._relieved_at = time.monotonic()
            self._start_once("drop", "", self.relief.free_space())
        # Holding does not save inodes: a disk is one inode of the host's, whatever is on it.
        if space.free_bytes < space.reserve_bytes * RECOVERED_ABOVE:
            self._hold_writers()
        else:
            self._release_held()
        if self.level is not Level.CRITICAL:
            self._critical_since = math.inf
            return
        self._critical_since = min(self._critical_since, time.monotonic())
        # Freezing the writers may have been enough.
        if time.monotonic() > self._critical_since + _CRITICAL_GRACE_SECONDS:
            self._terminate_one(space)

    def _hold_writers(self) -> None:
        recent = self._growth.recent()
        minimum = _CRITICAL_WRITER_BYTES if self.level is Level.CRITICAL else _HEAVY_WRITER_BYTES
        writers = [owner for owner, grown in recent.items() if grown >= minimum]
        for owner in {*writers, *self.containers.held()} & self.containers.running().keys():
            # Including those held already: copying a disk may have thawed them.
            reason = None if self.relief.is_build(owner) else HELD_MESSAGE
            self._start_once("hold", owner, self.containers.hold(owner, reason))

    def _release_held(self) -> None:
        for owner in self.containers.held():
            self._start_once("release", owner, self.containers.release(owner))

    def _terminate_one(self, space: DiskSpace) -> None:
        if time.monotonic() < self._next_termination:
            return
        owners: list[str] = []
        if space.free_bytes < space.reserve_bytes / 2:
            candidates = self._growth.largest(space.reserve_bytes // _MIN_GROWTH_SHARE)
            owners = [owner for owner in candidates if owner in self.containers.running()]
        for owner in [*owners, *reversed(self.relief.capturing())]:
            if owner not in self._terminated:
                self._terminated.add(owner)
                self._next_termination = time.monotonic() + scaled(_TERMINATION_SECONDS)
                _log.error("terminating %s: %s", owner, self._problem)
                self._start_once("end", owner, self._terminate(owner))
                return

    async def _terminate(self, owner: str) -> None:
        await self.relief.terminate_for_space(owner)
        self._next_termination = time.monotonic() + _SETTLE_SECONDS

    def _start_once(self, action: str, owner: str, work: Coroutine[Any, Any, None]) -> None:
        """Start an action that may block, unless the same is in progress for this owner."""
        key = (action, owner)
        if key in self._tasks:
            work.close()
            return
        task = in_background(_ignore_gone(work), f"for lack of disk space, {action} {owner}")
        self._tasks[key] = task
        task.add_done_callback(lambda _: self._tasks.pop(key, None))


async def _ignore_gone(work: Coroutine[Any, Any, None]) -> None:
    with contextlib.suppress(ContainerGone):
        await work


def can_write(directory: Path) -> bool:
    """Whether a file system accepts a change.

    Since Linux 6.14, statvfs(3) does not report an ext4 that an error has made read-only.
    """
    try:
        os.utime(directory)
    except OSError as error:
        _log.error("%s cannot be written to: %s", directory, error.strerror)
        return False
    return True


def dirty_bytes() -> int:
    """The dirty and writeback pages of the whole machine in bytes (proc(5), meminfo)."""
    total = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in ("Dirty", "Writeback"):
            total += int(rest.split()[0]) * 1024
    return total
