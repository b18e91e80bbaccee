"""Copying files within the kernel, holes as holes: what is not there takes no time and no disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator


def data_extents(descriptor: int) -> Iterator[tuple[int, int]]:
    """Where a file has data, as (start, end) offsets; holes are left out (lseek(2))."""
    end = 0
    while True:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, end


def copy_range(source: int, target: int, start: int, end: int) -> None:
    """Copy the bytes from ``start`` to ``end`` to the same place, within the kernel.

    By sendfile(2): copy_file_range(2) refuses to go from one file system to another.
    """
    os.lseek(target, start, os.SEEK_SET)
    while start < end:
        sent = os.sendfile(target, source, start, end - start)
        if sent == 0:
            return
        start += sent
