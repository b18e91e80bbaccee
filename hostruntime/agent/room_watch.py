"""Keeps tenants from the reserve of the disk (:mod:`hostruntime.host.room`), and lets them go on
again.

The file system is looked at every second, and the more often the less room there is.  What is in
memory of tenants' disks, and is written whoever stands still, counts as taken.

Below the reserve nothing new is begun, layers go, and whoever has written in the last seconds is
held: their containers are frozen as in a pause, and go on where they stood when there is a quarter
more than the reserve.  Freezing does not end a write(2) that is in the kernel (signal(7) has it
wait), and not the writing of what is in memory.  So with half of the reserve gone, one that has
grown the most since the room ran short is ended, and told why; then the next.  Who has not written
goes on, and is not ended for what others did: that would free little, and stop nothing.
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
from hostruntime.host.patience import scaled
from hostruntime.host.room import Level, Room
from hostruntime.host.tasks import every, in_background
from hostruntime.wire.health import DiskRoom

_GIB, _MIB = 1024**3, 1024**2
# So far above the reserve a second is soon enough: few disks write more in it.
_FAR_BYTES, _NEAR_BYTES = 8 * _GIB, 1 * _GIB
_FAR_SECONDS, _NEAR_SECONDS = 1.0, 0.2
# While somebody writes: a disk's cache takes gigabytes a second.
_CLOSE_SECONDS = 0.03
# Growth is what was written within this time.
_WINDOW_SECONDS = 5.0
# Who writes less than this in it goes on while there is only little room.
_MUCH_BYTES, _LITTLE_BYTES = 1 * _MIB, 64 * 1024
# In reserves: room again, so that not the next write makes it short.
WELL_AGAIN = 1.25
_DROP_SECONDS = 10.0
# Between two attempts to write.
_TRY_SECONDS = 5.0
# Who has written less than this part of the reserve is not ended: it would not help.
_END_SHARE = 64
# So long it has to be critical although those who wrote stand still.
_STILL_SECONDS = 0.5
# One that is ended may take so long to give its room back before the next has to go.
_END_SECONDS = 5.0
# When it is gone, its room is back after so long at the latest.
_SETTLE_SECONDS = 1.0
HELD = (
    "The machine is short of disk room, and this sandbox was writing to its disk: it stands still "
    "until there is room again, and then goes on by itself. Nothing is lost; try again later."
)
_log = logging.getLogger(__name__)


class Relief(Protocol):
    """What the watch has others do."""

    def drop_what_can_be(self) -> Coroutine[Any, Any, None]:
        """Begin nothing more that takes room, and delete what is made again."""

    def end_for_room(self, owner: str) -> Coroutine[Any, Any, None]:
        """End what an owner runs, and tell them why."""

    def is_build(self, owner: str) -> bool:
        """Whether what an owner runs is a build."""

    def capturing(self) -> list[str]:
        """The builds that write without a container; the newest last."""


@dataclass
class Growth:
    """How much each disk has grown of late, and since the room ran short."""

    _seen: deque[tuple[float, Mapping[str, int]]] = field(default_factory=deque)
    _short: Counter[str] = field(default_factory=Counter)

    def note(self, sizes: Mapping[str, int]) -> None:
        """The sizes of all disks now, in bytes."""
        now = time.monotonic()
        while len(self._seen) > 1 and self._seen[1][0] <= now - _WINDOW_SECONDS:
            self._seen.popleft()
        self._seen.append((now, sizes))
        for owner, grown in self.of_late().items():
            self._short[owner] = max(self._short[owner], grown)

    def of_late(self) -> dict[str, int]:
        """By how many bytes each has grown within the last seconds."""
        if not self._seen:
            return {}
        (_, before), (_, now) = self._seen[0], self._seen[-1]
        return {owner: size - before.get(owner, 0) for owner, size in now.items()}

    def largest_first(self, least: int) -> list[str]:
        """Whose has grown by so many bytes since the room ran short, and is there yet."""
        there = self._seen[-1][1] if self._seen else {}
        most = self._short.most_common()
        return [owner for owner, grown in most if grown >= least and owner in there]

    def begin_anew(self) -> None:
        """There is room: who wrote before is forgotten."""
        self._short.clear()


@dataclass
class RoomWatch:
    """Watches the file system of a state directory.  For one event loop."""

    root: Path
    containers: ContainerManager
    ballast: Ballast
    relief: Relief
    level: Level = Level.WELL
    _room: Room | None = None
    _fault: str | None = None
    _growth: Growth = field(default_factory=Growth)
    _tried_at: float = -_TRY_SECONDS
    _writable: bool = True
    _dropped_at: float = -_DROP_SECONDS
    # Who was ended since the room ran short, and when the next may be.
    _ended: set[str] = field(default_factory=set)
    _next_end: float = 0.0
    _critical_since: float = math.inf
    _tasks: dict[tuple[str, str], asyncio.Task[None]] = field(default_factory=dict)
    # Of its own: those that everybody uses may all be waiting for the disk.
    _thread: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="room")
    )
    # What changes something waits for the file system's journal, and that for whoever writes much.
    _changer: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="ballast")
    )
    _change: Future[None] | None = None

    def begin(self) -> asyncio.Task[None]:
        """Watch until the task is cancelled, and then :meth:`close`."""
        what = "the room on the disk could not be seen to"
        return every(self._pause, self.look, what, at_once=True)

    def close(self) -> None:
        """Leave off what was begun; waits for no disk."""
        self._thread.shutdown(wait=False)
        self._changer.shutdown(wait=False)
        for task in self._tasks.values():
            task.cancel()

    async def look(self) -> None:
        """Look once, and do what it takes.  Raises HostError, OSError."""
        loop = asyncio.get_running_loop()
        near = self._room is None or self._above() < _FAR_BYTES
        room, sizes = await loop.run_in_executor(self._thread, self._seen, near)
        self._room = room
        if self._change is None or self._change.done():
            self._change = self._changer.submit(self._touch, room)
        if near:
            self._growth.note({owner: size.whole for owner, size in sizes.items()})
        else:
            self._growth = Growth()
        self._say(room)
        if self.level in (Level.LOW, Level.CRITICAL):
            self._make_room(room)
        elif self.level is Level.WELL:
            self._growth.begin_anew()
            self._ended.clear()
            self._critical_since = math.inf
            self._let_go()

    def notes(self) -> list[str]:
        """What is wrong, in sentences."""
        held = len(self.containers.held())
        stand = f" {held} sandboxes and builds stand still until there is room." if held else ""
        return [self._fault + stand] if self._fault else []

    def status(self) -> DiskRoom:
        """For the agent's health."""
        status = DiskRoom(
            level=self.level.name.lower(),
            held=len(self.containers.held()),
            ballast=self.ballast.is_held,
        )
        if self._room is None:
            return status
        return replace(
            status,
            size_bytes=self._room.size_bytes,
            free_bytes=self._room.free_bytes,
            reserve_bytes=self._room.reserve_bytes,
            free_files=self._room.free_files,
            reserve_files=self._room.reserve_files,
        )

    # Pieces --------------------------------------------------------------------------------

    def _seen(self, near: bool) -> tuple[Room, Mapping[str, DiskSize]]:
        """In a thread, as a disk that hangs keeps whoever asks."""
        room = Room.of(self.root)
        room = replace(room, read_only=room.read_only or not self._writable)
        sizes = self.containers.disks.sizes() if near else {}
        unwritten = sum(size.unwritten for size in sizes.values())
        if unwritten:
            # A disk may have promised room that nothing is in (fallocate(2)).
            room = room.less(min(unwritten, dirty_bytes()))
        return room, sizes

    def _touch(self, room: Room) -> None:
        """In a thread that nobody waits for."""
        if time.monotonic() > self._tried_at + _TRY_SECONDS:
            self._tried_at = time.monotonic()
            self._writable = can_write(self.root)
        try:
            self.ballast.balance(room)
        except OSError as error:
            _log.error("the ballast could not be seen to: %s", error)

    def _above(self) -> int:
        assert self._room is not None
        return self._room.free_bytes - self._room.reserve_bytes

    def _pause(self) -> float:
        if self._room is None or not self.containers.running() or self._above() > _FAR_BYTES:
            return _FAR_SECONDS
        writing = max(self._growth.of_late().values(), default=0) >= _MUCH_BYTES
        return _CLOSE_SECONDS if writing and self._above() < _NEAR_BYTES else _NEAR_SECONDS

    def _say(self, room: Room) -> None:
        level = room.level
        if level is Level.WELL and self.level in (Level.LOW, Level.CRITICAL):
            # Not at the first block that somebody deletes.
            level = Level.WELL if room.shares >= WELL_AGAIN else Level.LOW
        self._fault = fault = None if level is Level.WELL else room.fault or self._fault
        error = HostUnavailable if room.read_only else HostFull
        self.containers.disks.refusal = None if fault is None else partial(error, fault)
        if level is not self.level:
            worse = level > self.level
            (_log.error if worse else _log.warning)("%s", self._fault or "there is room again")
        self.level = level

    def _make_room(self, room: Room) -> None:
        if time.monotonic() > self._dropped_at + _DROP_SECONDS:
            self._dropped_at = time.monotonic()
            self._start("drop", "", self.relief.drop_what_can_be())
        # A disk is one inode of the host's, whatever is on it.
        if room.free_bytes < room.reserve_bytes * WELL_AGAIN:
            self._hold_writers()
        else:
            self._let_go()
        if self.level is not Level.CRITICAL:
            self._critical_since = math.inf
            return
        self._critical_since = min(self._critical_since, time.monotonic())
        # Those who stand still now may have been all it took.
        if time.monotonic() > self._critical_since + _STILL_SECONDS:
            self._end_one(room)

    def _hold_writers(self) -> None:
        late = self._growth.of_late()
        much = _LITTLE_BYTES if self.level is Level.CRITICAL else _MUCH_BYTES
        writers = [owner for owner, grown in late.items() if grown >= much]
        for owner in {*writers, *self.containers.held()} & self.containers.running().keys():
            # Those that are held, too: a copy of the disk may have let them go.
            words = None if self.relief.is_build(owner) else HELD
            self._start("hold", owner, self.containers.hold(owner, words))

    def _let_go(self) -> None:
        for owner in self.containers.held():
            self._start("let go", owner, self.containers.let_go(owner))

    def _end_one(self, room: Room) -> None:
        if time.monotonic() < self._next_end:
            return
        growers: list[str] = []
        if room.free_bytes < room.reserve_bytes / 2:
            most = self._growth.largest_first(room.reserve_bytes // _END_SHARE)
            growers = [owner for owner in most if owner in self.containers.running()]
        for owner in [*growers, *reversed(self.relief.capturing())]:
            if owner not in self._ended:
                self._ended.add(owner)
                self._next_end = time.monotonic() + scaled(_END_SECONDS)
                _log.error("%s is ended: %s", owner, self._fault)
                self._start("end", owner, self._end(owner))
                return

    async def _end(self, owner: str) -> None:
        await self.relief.end_for_room(owner)
        self._next_end = time.monotonic() + _SETTLE_SECONDS

    def _start(self, what: str, owner: str, work: Coroutine[Any, Any, None]) -> None:
        """Do something that may have to wait for others, once at a time for each owner."""
        key = (what, owner)
        if key in self._tasks:
            work.close()
            return
        task = in_background(_unless_gone(work), f"for want of room, {what} {owner}")
        self._tasks[key] = task
        task.add_done_callback(lambda _: self._tasks.pop(key, None))


async def _unless_gone(work: Coroutine[Any, Any, None]) -> None:
    with contextlib.suppress(ContainerGone):
        await work


def can_write(directory: Path) -> bool:
    """Whether a file system takes a change.

    statvfs(3) does not say it of an ext4 that an error has made read-only since Linux 6.14.
    """
    try:
        os.utime(directory)
    except OSError as error:
        _log.error("%s cannot be written to: %s", directory, error.strerror)
        return False
    return True


def dirty_bytes() -> int:
    """How much the whole machine has in memory that is to be written (proc(5), meminfo)."""
    found = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in ("Dirty", "Writeback"):
            found += int(rest.split()[0]) * 1024
    return found
