"""What sandboxes used over their whole life: a point for about every 30 seconds, on disk.

A sandbox has a file ``usage/<id>.points`` beside its sums, of points of one size, oldest first.
Points are only appended, by one write each, so a killed agent loses the last 30 seconds and no
more. A point's figures are those of the time that it covers: while a sandbox is paused, or without
an agent, there are none.

A file that has become too long is thinned: a point may then cover up to a fiftieth of its age,
which is 30 seconds for the last 25 minutes, and half an hour after a day. So a file stays below
:data:`MAX_POINTS` points (56 KiB), however long a sandbox lives. One that lived for less than ten
seconds has none. Files are deleted a day after their sandbox ended.
"""

from __future__ import annotations

import contextlib
import os
import struct
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hostruntime.host.writing import write_atomically
from hostruntime.wire.sandboxes import MetricsPoint

POINT_SECONDS = 30.0
# Each sample may add so many points, or a tenth of all: those of a thousand sandboxes don't come
# at once, although a new agent meets all of them at once.
MIN_POINTS_PER_SAMPLE = 25
MAX_POINTS = 1024
KEEP_SECONDS = 86_400.0
MAX_FILES = 20_000
# Less than that isn't worth a file.
MIN_SECONDS = 10.0
SUFFIX = ".points"
# Unix time, seconds, CPU seconds, and bytes of memory, disk, sent and received.
_POINT = struct.Struct("<dffQQQQ")
_UNKNOWN = 2**64 - 1
_SHARE_OF_AGE = 1 / 50
# Points this far apart have time without figures between them.
_GAP_SECONDS = 5.0


@dataclass(frozen=True)
class Gauges:
    """What is read of a sandbox for a point: its disk, and its traffic so far; None if unknown."""

    disk_bytes: int | None = None
    traffic: tuple[int, int] | None = None


@dataclass
class Partial:
    """What is known of a point that isn't written yet."""

    id: str
    at: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    memory_byte_seconds: float = 0.0


@dataclass
class Histories:
    """The points of one host's sandboxes.

    ``gauges`` reads those of one sandbox. :meth:`write`, :meth:`close_file`, :meth:`read` and
    :meth:`sweep` block; call them in a thread. All else is for the event loop, and does no I/O.
    """

    directory: Path
    gauges: Callable[[str], Gauges]
    _partials: dict[str, Partial] = field(default_factory=dict)
    _cut: list[Partial] = field(default_factory=list)
    # What each had sent and received at its last point.
    _traffic: dict[str, tuple[int, int]] = field(default_factory=dict)
    # The running sandboxes that have a file.
    _stored: set[str] = field(default_factory=set)

    # On the event loop ---------------------------------------------------------------------

    def start(self, sandbox_id: str) -> None:
        """A sandbox has just been started: it has sent nothing yet."""
        self._traffic[sandbox_id] = (0, 0)

    def add(
        self, sandbox_id: str, at: float, seconds: float, cpu_seconds: float, memory_bytes: int
    ) -> None:
        """Add what was used in the ``seconds`` before ``at`` (Unix time)."""
        partial = self._partials.get(sandbox_id)
        if partial is None:
            partial = self._partials[sandbox_id] = Partial(sandbox_id)
        partial.at = at
        partial.seconds += seconds
        partial.cpu_seconds += cpu_seconds
        partial.memory_byte_seconds += memory_bytes * seconds

    def cut(self, sandbox_id: str) -> None:
        """A sandbox is paused: its point ends here."""
        partial = self._partials.pop(sandbox_id, None)
        if partial is not None:
            self._cut.append(partial)

    def take_due(self, *, everything: bool = False) -> list[Partial]:
        """The points to write now, the longest first; they are not returned again."""
        shortest = MIN_SECONDS if everything else POINT_SECONDS
        due = [one for one in self._partials.values() if one.seconds >= shortest]
        if not everything:
            due.sort(key=lambda partial: -partial.seconds)
            due = due[: max(MIN_POINTS_PER_SAMPLE, len(self._partials) // 10)]
        for partial in due:
            del self._partials[partial.id]
        taken, self._cut = [*self._cut, *due], []
        self._stored.update(partial.id for partial in taken)
        return taken

    def end(self, sandbox_id: str) -> Partial | None:
        """A sandbox has ended: what :meth:`close_file` is to be called with, if at all.

        Most live too shortly for a file.
        """
        ended = [one for one in self._cut if one.id == sandbox_id]
        if ended:
            # It was paused just before, or is still.  Written later, they would be taken for those
            # of a running one, which nobody would ever end.
            self._cut = [one for one in self._cut if one.id != sandbox_id]
        if (last := self._partials.pop(sandbox_id, None)) is not None:
            ended.append(last)
        partial = _total(sandbox_id, ended)
        self._traffic.pop(sandbox_id, None)
        stored = sandbox_id in self._stored
        self._stored.discard(sandbox_id)
        return partial if stored or partial.seconds >= MIN_SECONDS else None

    # In a thread ---------------------------------------------------------------------------

    def recover(self, running: Collection[str]) -> None:
        """Find which of the running sandboxes have a file.  Raises OSError."""
        self._stored = {path.stem for path in self._paths()} & set(running)

    def write(self, partials: Iterable[Partial]) -> None:
        """Append these points; a file and what is read of a sandbox for each.  Raises OSError."""
        for partial in partials:
            gauges, before = self.gauges(partial.id), self._traffic.get(partial.id)
            # It may have ended since it was taken.
            if gauges.traffic is not None and partial.id in self._stored:
                self._traffic[partial.id] = gauges.traffic
            self._append(partial.id, _point(partial, gauges, before))

    def close_file(self, partial: Partial) -> None:
        """Append the last point of a sandbox that is gone, from when its file is kept a day.

        Its disk and interface are gone as well.  Raises OSError.
        """
        if partial.seconds >= MIN_SECONDS:
            self._append(partial.id, _point(partial, Gauges(), None))
        else:
            os.utime(self._path(partial.id))

    def read(self, sandbox_id: str, since: float = 0.0) -> list[MetricsPoint]:
        """The points of a sandbox after ``since`` (Unix time); none without a file."""
        try:
            data = self._path(sandbox_id).read_bytes()
        except FileNotFoundError:
            return []
        return [point for point in _parse(data) if point.at > since]

    def sweep(self, running: Collection[str]) -> None:
        """Delete the files of sandboxes that ended a day ago, or of the oldest of too many."""
        ended: list[tuple[float, Path]] = []
        for path in self._paths():
            if path.stem not in running:
                with contextlib.suppress(FileNotFoundError):
                    ended.append((path.stat().st_mtime, path))
        ended.sort(reverse=True)
        oldest = time.time() - KEEP_SECONDS
        for number, (modified_at, path) in enumerate(ended):
            if number >= MAX_FILES or modified_at < oldest:
                path.unlink(missing_ok=True)

    def _paths(self) -> list[Path]:
        return list(self.directory.glob(f"*{SUFFIX}"))

    def _path(self, sandbox_id: str) -> Path:
        return self.directory / f"{sandbox_id}{SUFFIX}"

    def _append(self, sandbox_id: str, point: MetricsPoint) -> None:
        path = self._path(sandbox_id)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(path, flags, 0o600)
        try:
            size = os.lseek(descriptor, 0, os.SEEK_END)
            # A write that a full disk cut short is completed to a point without a time.
            os.write(descriptor, bytes(-size % _POINT.size) + _pack(point))
        finally:
            os.close(descriptor)
        if size >= MAX_POINTS * _POINT.size:
            points = thinned(list(_parse(path.read_bytes())), point.at)
            write_atomically(path, b"".join(map(_pack, points)), 0o600)


def _total(sandbox_id: str, partials: Iterable[Partial]) -> Partial:
    total = Partial(sandbox_id)
    for one in partials:
        total.at = max(total.at, one.at)
        total.seconds += one.seconds
        total.cpu_seconds += one.cpu_seconds
        total.memory_byte_seconds += one.memory_byte_seconds
    return total


def _point(partial: Partial, gauges: Gauges, before: tuple[int, int] | None) -> MetricsPoint:
    sent = received = None
    if gauges.traffic is not None and before is not None:
        sent, received = (
            max(now - then, 0) for now, then in zip(gauges.traffic, before, strict=True)
        )
    return MetricsPoint(
        partial.at,
        partial.seconds,
        partial.cpu_seconds,
        round(partial.memory_byte_seconds / partial.seconds),
        gauges.disk_bytes,
        sent,
        received,
    )


def thinned(points: Sequence[MetricsPoint], now: float) -> list[MetricsPoint]:
    """Points joined as far as their age allows, and further until a quarter of a file is free."""
    share, joined = _SHARE_OF_AGE, list(points)
    while len(joined) > MAX_POINTS * 3 // 4:
        joined = _joined(joined, now, share)
        share *= 2
    return joined


def _joined(points: Iterable[MetricsPoint], now: float, share: float) -> list[MetricsPoint]:
    found: list[MetricsPoint] = []
    for point in points:
        last = found[-1] if found else None
        if last is not None and _may_join(last, point, now, share):
            found[-1] = _sum(last, point)
        else:
            found.append(point)
    return found


def _may_join(last: MetricsPoint, point: MetricsPoint, now: float, share: float) -> bool:
    if last.seconds + point.seconds > max((now - point.at) * share, 0):
        return False
    gap = point.at - point.seconds - last.at
    # Who is paused and resumed all the time has only gaps.
    return gap < _GAP_SECONDS or share > 4 * _SHARE_OF_AGE


def _sum(one: MetricsPoint, other: MetricsPoint) -> MetricsPoint:
    seconds = one.seconds + other.seconds
    memory = one.memory_bytes * one.seconds + other.memory_bytes * other.seconds
    return MetricsPoint(
        other.at,
        seconds,
        one.cpu_seconds + other.cpu_seconds,
        round(memory / seconds),
        other.disk_bytes if other.disk_bytes is not None else one.disk_bytes,
        _sum_known(one.sent_bytes, other.sent_bytes),
        _sum_known(one.received_bytes, other.received_bytes),
    )


def _sum_known(*numbers: int | None) -> int | None:
    known = [number for number in numbers if number is not None]
    return sum(known) if known else None


def _pack(point: MetricsPoint) -> bytes:
    gauges = (point.disk_bytes, point.sent_bytes, point.received_bytes)
    numbers = (_UNKNOWN if number is None else number for number in gauges)
    return _POINT.pack(point.at, point.seconds, point.cpu_seconds, point.memory_bytes, *numbers)


def _parse(data: bytes) -> Iterable[MetricsPoint]:
    whole = len(data) - len(data) % _POINT.size
    for at, seconds, cpu_seconds, memory, *gauges in _POINT.iter_unpack(data[:whole]):
        # After a power failure a file may end in zeros.
        if at > 0 and seconds > 0:
            known = (None if number == _UNKNOWN else number for number in gauges)
            yield MetricsPoint(at, seconds, cpu_seconds, memory, *known)
