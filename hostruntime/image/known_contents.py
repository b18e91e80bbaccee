"""What a file holds, in the words of an image's digest, so that it need not be read again for it.

A capture has each small file's content in its hands once; the digest of the finished image wants
its SHA-256.  What is noted here is believed only of an inode whose size, modification and change
times are still those it was noted with: the kernel gives a new change time to whatever is written,
linked or given an attribute, and a file that took over a freed inode has a new one of each.
"""

from __future__ import annotations

import hashlib
import os
import struct

# How much of a file is judged at once: what is all zeros counts as a hole.
BLOCK = 64 * 1024
_ZEROS = bytes(BLOCK)
_AT_START = bytes(8)
_STAMP = struct.Struct("<3q")


class ContentHash:
    """The SHA-256 of each block that is not all zeros, its offset (8 bytes, big-endian) before it.

    Given pieces in order, each from a multiple of :data:`BLOCK` on.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, data: bytes, start: int) -> None:
        """Count the bytes at ``start``."""
        view = memoryview(data)
        for offset in range(0, len(data), BLOCK):
            block = view[offset : offset + BLOCK]
            if block != _ZEROS[: len(block)]:
                self._hash.update((start + offset).to_bytes(8, "big"))
                self._hash.update(block)

    def digest(self) -> bytes:
        """The hash of what was added, 32 bytes."""
        return self._hash.digest()


def content_hash(data: bytes) -> bytes:
    """The hash of a whole file's content."""
    if len(data) <= BLOCK:
        zeros = data == _ZEROS[: len(data)]
        return hashlib.sha256(b"" if zeros else _AT_START + data).digest()
    found = ContentHash()
    found.add(data, 0)
    return found.digest()


class KnownContents:
    """The hashes of files without extended attributes, by inode: some 150 bytes of memory each."""

    def __init__(self) -> None:
        self._known: dict[int, bytes] = {}

    def note(self, found: os.stat_result, digest: bytes) -> None:
        """The file of that status has no extended attributes, and a content of that hash."""
        self._known[found.st_ino] = _stamp(found) + digest

    def digest_of(self, found: os.stat_result) -> bytes | None:
        """The hash of a file that is as it was noted; None of any other."""
        known = self._known.get(found.st_ino)
        if known is None or not known.startswith(_stamp(found)):
            return None
        return known[_STAMP.size :]


def _stamp(found: os.stat_result) -> bytes:
    return _STAMP.pack(found.st_size, found.st_mtime_ns, found.st_ctime_ns)
