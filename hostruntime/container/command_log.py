"""What a background command prints: the last mebibytes of it, in a file of a fixed size.

::

    offset 0     8 bytes, little endian: how many bytes were ever written
    offset 4096  a ring: the byte at position p of the output is at p modulo its size

The one writer puts bytes into the ring before it counts them, at most :data:`MAX_WRITE_BYTES` at
once, so whoever reads can rely on all but so many of the oldest (:data:`KEPT_BYTES`); and on what
they have read only if it is still among those afterwards.  Positions are never reused: they go on
counting where the oldest output has been overwritten.

Imported by launchers, so it imports next to nothing.
"""

from __future__ import annotations

import contextlib
import os
import struct
from dataclasses import dataclass

_START = 4096
RING_BYTES = 4 * 1024 * 1024
MAX_WRITE_BYTES = 64 * 1024
KEPT_BYTES = RING_BYTES - MAX_WRITE_BYTES
_COUNT = struct.Struct("<Q")


def allocate(descriptor: int) -> None:
    """Make an empty file a log that has all its space.  Raises OSError (ENOSPC)."""
    os.posix_fallocate(descriptor, 0, _START + RING_BYTES)


class LogWriter:
    """The one writer of a log, from its beginning."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.size = 0

    def write(self, data: bytes) -> None:
        """Append at most :data:`MAX_WRITE_BYTES`.  Raises OSError; then nothing is appended."""
        position = self.size % RING_BYTES
        first = data[: RING_BYTES - position]
        os.pwrite(self._descriptor, first, _START + position)
        if len(first) < len(data):
            os.pwrite(self._descriptor, data[len(first) :], _START)
        os.pwrite(self._descriptor, _COUNT.pack(self.size + len(data)), 0)
        self.size += len(data)

    def finish(self) -> None:
        """Give back the space that was not needed."""
        if self.size < RING_BYTES:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, _START + self.size)


@dataclass(frozen=True)
class Part:
    """A part of a log: ``data`` starts at ``offset``; ``size`` is how much was ever written.

    ``offset`` is not what was asked for where that has been overwritten.
    """

    data: bytes
    offset: int
    size: int


def read(descriptor: int, offset: int, max_bytes: int) -> Part:
    """Read a log from ``offset``, or from the oldest byte there is.  Raises OSError."""
    while True:
        size = _size(descriptor)
        start = min(max(offset, size - KEPT_BYTES, 0), size)
        data = _read_ring(descriptor, start, min(size - start, max_bytes))
        # Overwritten meanwhile, it is read again; its writer is slower than this (supervisor.py).
        if start >= _size(descriptor) - KEPT_BYTES:
            return Part(data, start, size)


def _size(descriptor: int) -> int:
    data = os.pread(descriptor, _COUNT.size, 0)
    return int(_COUNT.unpack(data)[0]) if len(data) == _COUNT.size else 0


def _read_ring(descriptor: int, start: int, length: int) -> bytes:
    position = start % RING_BYTES
    first = os.pread(descriptor, min(length, RING_BYTES - position), _START + position)
    if len(first) == length:
        return first
    return first + os.pread(descriptor, length - len(first), _START)
