"""Free space on the file system of the state directory, and the installation's reserve in it.

Tenants' disks are sparse files there: they may grow to many times what the machine has.  The
installation itself (PostgreSQL, logs, records) must always be able to write, so a *reserve* of
blocks and inodes is set aside: a twentieth of them, but no less than 1 GiB and no more than 8 GiB,
and a fifth of a small file system; ``ORKESTR_RESERVE_GIB`` overrides that.  Below the reserve
nothing new is started, and :mod:`hostruntime.agent.disk_monitor` acts on those who write.

What counts as free is what is free for everybody (``f_bavail``, ``f_favail`` in statvfs(3)):
PostgreSQL cannot use the blocks that ext4 reserves for root.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path

from hostruntime.errors import HostFull, HostUnavailable, InvalidRequest

RESERVE_SETTING = "ORKESTR_RESERVE_GIB"
_GIB, _MIB = 1024**3, 1024**2
_RESERVE_SHARE, _MAX_SHARE_OF_SMALL = 0.05, 0.2
_MIN_BYTES, _MAX_BYTES = 1 * _GIB, 8 * _GIB
_MIN_FILES, _MAX_FILES = 10_000, 200_000


class Level(IntEnum):
    """How scarce disk space is, by severity."""

    NORMAL = 0
    # Nothing new is started; heavy writers are frozen.
    LOW = 1
    # Half of the reserve is used up: the heaviest writer is terminated.
    CRITICAL = 2
    # Nothing can be written at all.
    READ_ONLY = 3

    @property
    def wire_name(self) -> str:
        """The level's name in the agent's API."""
        return "well" if self is Level.NORMAL else self.name.lower()


@dataclass(frozen=True)
class DiskSpace:
    """Free and reserved bytes and inodes of a file system.

    A file system that creates inodes on demand reports none (``files`` is 0): they never run out.
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
    def of(cls, path: Path) -> DiskSpace:
        """Measure the file system that holds ``path``.  Raises OSError."""
        stat = os.statvfs(path)
        size = stat.f_blocks * stat.f_frsize
        return cls(
            path,
            size,
            stat.f_bavail * stat.f_frsize,
            stat.f_files,
            stat.f_favail,
            _reserve_bytes(size),
            int(_reserve_of(stat.f_files, _MIN_FILES, _MAX_FILES)),
            read_only=bool(stat.f_flag & os.ST_RDONLY),
        )

    def after_writing(self, size_bytes: int) -> DiskSpace:
        """The space that would be left after ``size_bytes`` more are written."""
        return replace(self, free_bytes=self.free_bytes - size_bytes)

    @property
    def free_ratio(self) -> float:
        """Free space as a multiple of the reserve, of bytes or inodes, whichever is scarcer."""
        bytes_ratio = self.free_bytes / self.reserve_bytes if self.reserve_bytes else math.inf
        files_ratio = self.free_files / self.reserve_files if self.reserve_files else math.inf
        return min(bytes_ratio, files_ratio)

    @property
    def level(self) -> Level:
        """The severity that follows from :attr:`free_ratio`."""
        if self.read_only:
            return Level.READ_ONLY
        if self.free_ratio < 0.5:
            return Level.CRITICAL
        return Level.LOW if self.free_ratio < 1 else Level.NORMAL

    @property
    def problem(self) -> str | None:
        """What is wrong and what to do about it, as a sentence; None if nothing is."""
        if self.read_only:
            return (
                f"The file system of {self.path} is mounted read-only, most likely after an error "
                "of the disk (`dmesg` says which): nothing can be saved, started or stopped "
                "properly. Check it with fsck and mount it writable; everything then resumes."
            )
        if self.level is Level.NORMAL:
            return None
        remaining = f"{max(self.free_bytes, 0) // _MIB} MiB and {self.free_files} inodes"
        if not self.files:
            remaining = f"{max(self.free_bytes, 0) // _MIB} MiB"
        return (
            f"The disk under {self.path} has {remaining} left, less than what is reserved for the "
            f"installation ({self.reserve_bytes // _MIB} MiB, {self.reserve_files} inodes; "
            f"{RESERVE_SETTING}). Delete templates or sandboxes, or free up space on it."
        )

    def require(self, size_bytes: int = 0) -> None:
        """Raise HostFull if ``size_bytes`` would use the reserve, HostUnavailable if read-only."""
        after = self.after_writing(size_bytes)
        if self.read_only:
            raise HostUnavailable(str(self.problem))
        if after.level is not Level.NORMAL:
            raise HostFull(str(self.problem or f"There is no room on the disk under {self.path}."))


def _reserve_bytes(size: int) -> int:
    setting = os.environ.get(RESERVE_SETTING, "").strip()
    if not setting:
        return int(_reserve_of(size, _MIN_BYTES, _MAX_BYTES))
    try:
        reserve = float(setting) * _GIB
    except ValueError:
        reserve = math.nan
    if not 0 < reserve < math.inf:
        raise InvalidRequest(f"{RESERVE_SETTING} is {setting!r}; it takes a number of GiB above 0.")
    return int(min(reserve, size * 0.9))


def _reserve_of(total: float, minimum: float, maximum: float) -> float:
    return min(max(total * _RESERVE_SHARE, minimum), maximum, total * _MAX_SHARE_OF_SMALL)
