"""Ballast: disk space that is allocated while there is plenty, and released in an emergency.

When a disk is full to the last block, nobody can clean it up: PostgreSQL cannot even write the log
of a transaction that would delete something.  So an empty file with allocated blocks
(posix_fallocate(3)) lies in the state directory until the disk is nearly full, and is allocated
again once there is enough space.
"""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from hostruntime.host.disk_space import DiskSpace

_MIB = 1024**2
_MAX_BYTES = 256 * _MIB
_MIN_BYTES = 16 * _MIB
# The maximum share of a small file system.
_SHARE = 1 / 32
# Free space, as a multiple of the reserve, below which it is released and above which allocated.
RELEASE_BELOW, ALLOCATE_ABOVE = 0.25, 1.5
_log = logging.getLogger(__name__)


@dataclass
class Ballast:
    """The ballast of one installation.  Every method blocks for some milliseconds."""

    path: Path
    _refused: bool = False

    def balance(self, space: DiskSpace) -> None:
        """Allocate or release it, depending on the free space."""
        if space.read_only:
            return
        if space.free_ratio < RELEASE_BELOW:
            self.release()
        elif space.free_ratio > ALLOCATE_ABOVE and not self._refused:
            self._allocate(space)

    def release(self) -> None:
        """Free the space; idempotent.  Raises OSError."""
        try:
            self.path.unlink()
        except FileNotFoundError:
            return
        _log.error("the disk is nearly full: released the ballast %s", self.path)

    @property
    def is_allocated(self) -> bool:
        """Whether it is allocated."""
        return self.path.exists()

    def _allocate(self, space: DiskSpace) -> None:
        size = ballast_bytes(space)
        if (
            self.is_allocated
            or size < _MIN_BYTES
            or space.after_writing(size).free_ratio <= ALLOCATE_ABOVE
        ):
            return
        temporary = self.path.with_suffix(".new")
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(temporary, flags, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, size)
            finally:
                os.close(descriptor)
            temporary.rename(self.path)
        except OSError as error:
            self._refused = True
            _log.warning("this file system supports no ballast: %s", error.strerror)
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def ballast_bytes(space: DiskSpace) -> int:
    """The ballast's size on such a file system."""
    return int(min(_MAX_BYTES, space.size_bytes * _SHARE, space.reserve_bytes / 2))
