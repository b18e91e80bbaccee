"""Content hashes of files as an image's digest defines them, cached so each file is read once.

A capture reads each small file anyway, and the digest of the finished image needs its SHA-256. A
cached hash is valid only while the inode's size, modification time and change time are the same:
the kernel updates the change time on every write, link and attribute change, and a file that
reuses a freed inode has new times.
"""

from __future__ import annotations

import hashlib
import os
import struct

# A block that is all zeros counts as a hole.
BLOCK = 64 * 1024
_ZEROS = bytes(BLOCK)
_OFFSET_ZERO = bytes(8)
_STAMP = struct.Struct("<3q")


class ContentHash:
    """SHA-256 of the blocks that are not all zeros, each after its offset (8 bytes, big-endian).

    Add data in order; each piece must start at a multiple of :data:`BLOCK`.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, data: bytes, start: int) -> None:
        """Add the bytes at offset ``start``."""
        view = memoryview(data)
        for offset in range(0, len(data), BLOCK):
            block = view[offset : offset + BLOCK]
            if block != _ZEROS[: len(block)]:
                self._hash.update((start + offset).to_bytes(8, "big"))
                self._hash.update(block)

    def digest(self) -> bytes:
        """Return the hash, 32 bytes."""
        return self._hash.digest()


def content_hash(data: bytes) -> bytes:
    """Hash the complete content of a file."""
    if len(data) <= BLOCK:
        zeros = data == _ZEROS[: len(data)]
        return hashlib.sha256(b"" if zeros else _OFFSET_ZERO + data).digest()
    found = ContentHash()
    found.add(data, 0)
    return found.digest()


class ContentHashCache:
    """Hashes of files without extended attributes, by inode; about 150 bytes of memory each."""

    def __init__(self) -> None:
        self._known: dict[int, bytes] = {}

    def add(self, found: os.stat_result, digest: bytes) -> None:
        """Cache the content hash of a file that has no extended attributes."""
        self._known[found.st_ino] = _stamp(found) + digest

    def lookup(self, found: os.stat_result) -> bytes | None:
        """Return the hash of a file unchanged since it was added; None for any other."""
        known = self._known.get(found.st_ino)
        if known is None or not known.startswith(_stamp(found)):
            return None
        return known[_STAMP.size :]


def _stamp(found: os.stat_result) -> bytes:
    return _STAMP.pack(found.st_size, found.st_mtime_ns, found.st_ctime_ns)
