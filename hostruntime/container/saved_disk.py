"""Copies of a mounted disk: whether they are whole, and how they become disks of their own.

A copy that was taken after everything had been written, and during which nothing was, differs from
an unmounted disk in three things, as there is no journal:

* It is not marked as clean.
* The superblock's count of free blocks is old; the next mount counts anew
  (ext4_percpu_param_init in the kernel's fs/ext4/super.c).
* Files that were deleted while programs had them open still have their inode and blocks, which
  nothing would ever free.

For the last one the copy needs e2fsck(8), which reads all of it once more and is a process, with a
flush of its own.  Most copies have no such file, and then are only marked.  The layout is that of
"Data Structures and Algorithms" in the kernel's Documentation/filesystems/ext4.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from hostruntime.errors import HostFault
from hostruntime.host import kernel
from hostruntime.host.run import run

_FSCK_SECONDS = 300.0
# e2fsck(8): no errors; errors corrected.
_FSCK_SUCCESS = frozenset({0, 1})
# Each takes a fraction of a millisecond if there is nothing to write.
_FLUSHES = 4

_SUPERBLOCK, _SUPERBLOCK_BYTES, _MAGIC = 1024, 1024, 0xEF53
_STATE_OFFSET, _CLEAN, _WITH_ERRORS = 0x3A, 1, 2
# filetype, extents, 64bit and flex_bg: what our disks have.  Another could change the layout.
_KNOWN_INCOMPATIBLE = 0x2 | 0x40 | 0x80 | 0x200
_JOURNAL, _CHECKSUMS = 0x4, 0x400
_NO_INODES = 1
_LINKS_OFFSET = 0x1A
_log = logging.getLogger(__name__)


# While it is copied ------------------------------------------------------------------------


class DeviceWrites(NamedTuple):
    """How much was written to a block device and discarded, in requests and sectors."""

    writes: int
    sectors: int
    discards: int


def write_out(mounted: Path) -> DeviceWrites | None:
    """Write everything that is cached of a file system; return its device's counts after that.

    None if there is always more to write, or if the counts aren't kept.  Raises OSError.
    """
    before = device_writes(mounted)
    for _ in range(_FLUSHES):
        kernel.syncfs(mounted)
        after = device_writes(mounted)
        if after is not None and after == before:
            return after
        before = after
    return None


def device_writes(mounted: Path) -> DeviceWrites | None:
    """The counts of the device that is mounted; None while requests are under way.

    See Documentation/block/stat.rst.  Raises OSError.
    """
    number = mounted.stat().st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if (device / "queue/iostats").read_text().strip() != "1":
        return None
    fields = [int(field) for field in (device / "stat").read_text().split()]
    return None if fields[8] else DeviceWrites(fields[4], fields[6], fields[11])


# Afterwards --------------------------------------------------------------------------------


def finish(saved: Path, *, consistent: bool) -> None:
    """Make the copy of a mounted disk one to mount.

    ``consistent``: nothing was written to the disk while it was copied.  Raises HostFault, OSError.
    """
    if not (consistent and _mark_clean(saved)):
        repair(saved)


def repair(saved: Path) -> None:
    """Have e2fsck(8) put a copy right.  Raises HostFault."""
    result = run(["e2fsck", "-f", "-p", str(saved)], timeout=_FSCK_SECONDS, check=False)
    if result.returncode not in _FSCK_SUCCESS:
        _log.error("%s cannot be repaired: %s", saved, result.text.strip()[-500:])
        raise HostFault("The copy of the sandbox's disk could not be repaired; try again.")


def _mark_clean(saved: Path) -> bool:
    """Mark a consistent copy as clean, if nothing in it has to be repaired."""
    descriptor = os.open(saved, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        layout = _read_layout(descriptor)
        if layout is None or _has_unnamed_files(descriptor, layout):
            return False
        os.pwrite(descriptor, struct.pack("<H", _CLEAN), _SUPERBLOCK + _STATE_OFFSET)
        return True
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class _Layout:
    """Where things are in a file system; numbers of bytes, except for ``inodes``, of a group."""

    block: int
    inodes: int
    inode: int
    first_inode: int
    groups: int
    descriptors: int
    descriptor: int


def _read_layout(descriptor: int) -> _Layout | None:
    """The layout, from the superblock; None for one that isn't as ours are, or has errors."""
    data = os.pread(descriptor, _SUPERBLOCK_BYTES, _SUPERBLOCK)
    if len(data) < _SUPERBLOCK_BYTES:
        return None
    magic, state = struct.unpack_from("<HH", data, 0x38)
    incompatible, compatible_to_read = struct.unpack_from("<II", data, 0x60)
    if (
        magic != _MAGIC
        or state & _WITH_ERRORS
        or struct.unpack_from("<I", data, 0x5C)[0] & _JOURNAL
        or incompatible & ~_KNOWN_INCOMPATIBLE
        or compatible_to_read & _CHECKSUMS
    ):
        return None
    total, blocks = struct.unpack_from("<II", data, 0)
    first_block, shift = struct.unpack_from("<II", data, 0x14)
    blocks_per_group, inodes = struct.unpack_from("<I4xI", data, 0x20)
    first_inode, inode = struct.unpack_from("<IH", data, 0x54)
    descriptor_bytes = struct.unpack_from("<H", data, 0xFE)[0] if incompatible & 0x80 else 32
    block = 1024 << shift
    groups = -(-(blocks - first_block) // blocks_per_group)
    if groups * inodes != total:
        return None
    return _Layout(
        block=block,
        inodes=inodes,
        inode=inode,
        first_inode=first_inode,
        groups=groups,
        descriptors=(first_block + 1) * block,
        descriptor=descriptor_bytes,
    )


def _has_unnamed_files(descriptor: int, layout: _Layout) -> bool:
    """Whether an inode is in use that has no name."""
    table = os.pread(descriptor, layout.groups * layout.descriptor, layout.descriptors)
    if len(table) < layout.groups * layout.descriptor:
        return True
    return any(
        _group_has_unnamed_files(descriptor, layout, number, table)
        for number in range(layout.groups)
    )


def _group_has_unnamed_files(descriptor: int, layout: _Layout, number: int, table: bytes) -> bool:
    offset = number * layout.descriptor
    bitmap, inodes = struct.unpack_from("<II", table, offset + 4)
    (flags,) = struct.unpack_from("<H", table, offset + 0x12)
    (never_used,) = struct.unpack_from("<H", table, offset + 0x1C)
    if layout.descriptor > 32:
        bitmap += struct.unpack_from("<I", table, offset + 0x24)[0] << 32
        inodes += struct.unpack_from("<I", table, offset + 0x28)[0] << 32
        never_used += struct.unpack_from("<H", table, offset + 0x32)[0] << 16
    used = layout.inodes - never_used
    if flags & _NO_INODES or used <= 0:
        return False
    bits = os.pread(descriptor, -(-used // 8), bitmap * layout.block)
    # Of the first ones, most are reserved, and have no names.
    reserved = layout.first_inode - 1 if number == 0 else 0
    content = os.pread(descriptor, used * layout.inode, inodes * layout.block)
    return any(
        index >= reserved and bits[index // 8] >> index % 8 & 1
        for index in _without_links(content, layout.inode)
    )


def _without_links(inodes: bytes, size: int) -> Iterator[int]:
    """The positions of the inodes of a table whose count of links is 0."""
    # Bytes with a stride, as there may be hundreds of thousands of them.
    low, high = inodes[_LINKS_OFFSET::size], inodes[_LINKS_OFFSET + 1 :: size]
    found = low.find(0)
    while found >= 0:
        if not high[found]:
            yield found
        found = low.find(0, found + 1)
