"""Ballast: room that is taken while there is plenty, to be let go of when there is none.

Who fills a disk to the last block leaves nobody room to get out of it: PostgreSQL cannot write the
log of a transaction that would delete something.  So a file of nothing lies in the state directory,
its blocks allocated (posix_fallocate(3)), until the disk is nearly full; and again once there is
room.
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
# Of a small file system it takes less.
_SHARE = 1 / 32
# It goes when so little is left of the reserve, and is taken when so much is free, in reserves.
RELEASE_BELOW, ALLOCATE_ABOVE = 0.25, 1.5
_log = logging.getLogger(__name__)


@dataclass
class Ballast:
    """The ballast of one installation.  All of it blocks for some milliseconds."""

    path: Path
    _refused: bool = False

    def balance(self, space: DiskSpace) -> None:
        """Take it, or let it go, as the room is."""
        if space.read_only:
            return
        if space.free_ratio < RELEASE_BELOW:
            self.release()
        elif space.free_ratio > ALLOCATE_ABOVE and not self._refused:
            self._allocate(space)

    def release(self) -> None:
        """Give the room back; idempotent.  Raises OSError."""
        try:
            self.path.unlink()
        except FileNotFoundError:
            return
        _log.error("the disk is nearly full: the ballast %s was let go", self.path)

    @property
    def is_allocated(self) -> bool:
        """Whether there is any."""
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
            _log.warning("there is no ballast on this file system: %s", error.strerror)
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def ballast_bytes(space: DiskSpace) -> int:
    """How much it is on such a file system."""
    return int(min(_MAX_BYTES, space.size_bytes * _SHARE, space.reserve_bytes / 2))
