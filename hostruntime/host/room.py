"""Room on the file system of the state directory, and how much of it is the installation's own.

Tenants' disks are sparse files there: they may grow to many times what the machine has.  What the
installation itself needs (PostgreSQL, logs, records) must be written all the same, so a *reserve*
is kept of the blocks and of the inodes: a twentieth of them, but no less than 1 GiB and no more
than 8 GiB, and a fifth of a small file system; ``ORKESTR_RESERVE_GIB`` says otherwise.  Below it
nothing new is begun, and :mod:`hostruntime.agent.room_watch` sees to those who write.

What counts as free is what is free for everybody (``f_bavail``, ``f_favail`` in statvfs(3)):
PostgreSQL has no part in what ext4 keeps for root.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path

from hostruntime.errors import HostFull, HostUnavailable, InvalidRequest

SETTING = "ORKESTR_RESERVE_GIB"
_GIB, _MIB = 1024**3, 1024**2
_SHARE, _MOST_OF_SMALL = 0.05, 0.2
_LEAST_BYTES, _MOST_BYTES = 1 * _GIB, 8 * _GIB
_LEAST_FILES, _MOST_FILES = 10_000, 200_000


class Level(IntEnum):
    """How short the room is, from none of it to all."""

    WELL = 0
    # Nothing new is begun; who writes much stands still.
    LOW = 1
    # Half of the reserve is gone: who wrote the most is ended.
    CRITICAL = 2
    # Nothing can be written at all.
    READ_ONLY = 3


@dataclass(frozen=True)
class Room:
    """What is free of a file system, in bytes and inodes, and what is reserved of each.

    A file system that makes inodes as it goes counts none (``files`` is 0): they never run out.
    """

    path: Path
    size_bytes: int
    free_bytes: int
    files: int
    free_files: int
    reserve_bytes: int
    reserve_files: int
    read_only: bool = False

    @classmethod
    def of(cls, path: Path) -> Room:
        """What there is where ``path`` is.  Raises OSError."""
        seen = os.statvfs(path)
        size = seen.f_blocks * seen.f_frsize
        return cls(
            path,
            size,
            seen.f_bavail * seen.f_frsize,
            seen.f_files,
            seen.f_favail,
            _bytes_kept(size),
            int(_bounded(seen.f_files, _LEAST_FILES, _MOST_FILES)),
            read_only=bool(seen.f_flag & os.ST_RDONLY),
        )

    def less(self, size_bytes: int) -> Room:
        """The same with so many bytes taken."""
        return replace(self, free_bytes=self.free_bytes - size_bytes)

    @property
    def shares(self) -> float:
        """How many times the reserve is free, of what is shorter."""
        of_bytes = self.free_bytes / self.reserve_bytes if self.reserve_bytes else math.inf
        of_files = self.free_files / self.reserve_files if self.reserve_files else math.inf
        return min(of_bytes, of_files)

    @property
    def level(self) -> Level:
        """How short it is."""
        if self.read_only:
            return Level.READ_ONLY
        if self.shares < 0.5:
            return Level.CRITICAL
        return Level.LOW if self.shares < 1 else Level.WELL

    @property
    def fault(self) -> str | None:
        """What is wrong with it and what to do, as a sentence; None while it is well."""
        if self.read_only:
            return (
                f"The file system of {self.path} is mounted read-only, most likely after an error "
                "of the disk (`dmesg` says which): nothing can be kept, begun or ended properly. "
                "Check it with fsck and mount it writable; everything then goes on by itself."
            )
        if self.level is Level.WELL:
            return None
        left = f"{max(self.free_bytes, 0) // _MIB} MiB and {self.free_files} inodes"
        if not self.files:
            left = f"{max(self.free_bytes, 0) // _MIB} MiB"
        return (
            f"The disk under {self.path} has {left} left, less than what is reserved for the "
            f"installation ({self.reserve_bytes // _MIB} MiB, {self.reserve_files} inodes; "
            f"{SETTING}). Delete templates or sandboxes, or make room on it."
        )

    def require(self, size_bytes: int = 0) -> None:
        """Raise HostFull if so much more would be of the reserve, HostUnavailable if read-only."""
        after = self.less(size_bytes)
        if self.read_only:
            raise HostUnavailable(str(self.fault))
        if after.level is not Level.WELL:
            raise HostFull(str(self.fault or f"There is no room on the disk under {self.path}."))


def _bytes_kept(size: int) -> int:
    asked = os.environ.get(SETTING, "").strip()
    if not asked:
        return int(_bounded(size, _LEAST_BYTES, _MOST_BYTES))
    try:
        kept = float(asked) * _GIB
    except ValueError:
        kept = math.nan
    if not 0 < kept < math.inf:
        raise InvalidRequest(f"{SETTING} is {asked!r}; it takes a number of GiB above 0.")
    return int(min(kept, size * 0.9))


def _bounded(whole: float, least: float, most: float) -> float:
    return min(max(whole * _SHARE, least), most, whole * _MOST_OF_SMALL)
