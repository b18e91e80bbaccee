"""Copying one file with all that belongs to it, to another file system or a name of its own.

Everything goes by directory descriptors, one name at a time, through no link.  A capture copies
hundreds of thousands of small files, and what a file costs is the number of calls made for it: a
small one is read and written in one call each, and of its owner, mode and attributes only that is
set which the new file does not have already.
"""

from __future__ import annotations

import os
import stat

from hostruntime.host.progress import Progress
from hostruntime.image.known_contents import KnownContents, content_hash
from hostruntime.image.sparse import copy_range, data_extents
from hostruntime.image.trees import BLOCK_BYTES, Check, attributes, child_path, status

CAPABILITY = "security.capability"
# Up to this size a file is read whole; of a larger one the kernel moves the bytes.
SMALL_BYTES = 128 * 1024
_PIECE = 16 * 1024 * 1024
_READING = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOATIME | os.O_CLOEXEC
_WRITING = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def kept(attribute: str) -> bool:
    """Whether an extended attribute belongs to the file and not to the host or the overlay."""
    return attribute == CAPABILITY or not attribute.startswith(("trusted.", "security."))


class Copier:
    """Copies files; notes of small ones what they hold, and counts.  ``check`` may end it."""

    def __init__(self, check: Check, known: KnownContents, progress: Progress) -> None:
        self._check = check
        self._known = known
        self._progress = progress

    def copy(self, name: str, source: int, target: int) -> None:
        """Copy a symlink, a FIFO or a regular file to the same name.  Raises OSError."""
        found = status(name, source)
        if stat.S_ISREG(found.st_mode):
            descriptor = opened_file(name, source)
            try:
                self.copy_file(descriptor, os.fstat(descriptor), name, target)
            finally:
                os.close(descriptor)
        else:
            copy_special(name, source, target, found)

    def copy_file(self, old: int, found: os.stat_result, name: str, target: int) -> None:
        """Copy the regular file open as ``old``, whose status is ``found``.  Raises OSError."""
        new = os.open(name, _WRITING, stat.S_IMODE(found.st_mode) & 0o777, dir_fd=target)
        try:
            digest = self._copy_content(old, new, found)
            bare = _copy_what_differs(old, new, found)
            os.utime(new, ns=(found.st_atime_ns, found.st_mtime_ns))
            if bare and digest is not None:
                self._known.note(os.fstat(new), digest)
        finally:
            os.close(new)
        self._progress.bytes += found.st_size

    def _copy_content(self, old: int, new: int, found: os.stat_result) -> bytes | None:
        """Copy what a file holds; return the hash of that if it had to be looked at anyway."""
        size = found.st_size
        if size == 0:
            return None
        # Fewer blocks than bytes is a file with holes, which stay holes.
        if size <= SMALL_BYTES and found.st_blocks * BLOCK_BYTES >= size:
            data = os.read(old, size)
            written = os.write(new, data)
            if written == len(data) == size:
                return content_hash(data)
        for start, end in data_extents(old):
            for offset in range(start, end, _PIECE):
                self._check()
                copy_range(old, new, offset, min(offset + _PIECE, end))
        os.ftruncate(new, size)
        return None


def opened_file(name: str, directory: int) -> int:
    """A regular file's descriptor, for reading only.  Raises OSError."""
    return os.open(name, _READING, dir_fd=directory)


def _copy_what_differs(old: int, new: int, found: os.stat_result) -> bool:
    """Owner, attributes and mode, in this order; whether there are no attributes at all."""
    made = os.fstat(new)
    if (made.st_uid, made.st_gid) != (found.st_uid, found.st_gid):
        os.fchown(new, found.st_uid, found.st_gid)
    names = [attribute for attribute in os.listxattr(old) if kept(attribute)]
    for attribute in names:
        os.setxattr(new, attribute, os.getxattr(old, attribute))
    if made.st_mode != found.st_mode:
        os.fchmod(new, stat.S_IMODE(found.st_mode))
    return not names


def copy_special(name: str, source: int, target: int, found: os.stat_result) -> None:
    """Copy a symlink or a FIFO, whose status is ``found``.  Raises OSError."""
    if stat.S_ISLNK(found.st_mode):
        os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
    else:
        os.mkfifo(name, dir_fd=target)
    os.chown(name, found.st_uid, found.st_gid, dir_fd=target, follow_symlinks=False)
    for attribute in filter(kept, attributes(name, source)):
        value = os.getxattr(child_path(name, source), attribute, follow_symlinks=False)
        os.setxattr(child_path(name, target), attribute, value, follow_symlinks=False)
    if not stat.S_ISLNK(found.st_mode):
        os.chmod(child_path(name, target), stat.S_IMODE(found.st_mode))  # noqa: PTH101 - by descriptor
    times = (found.st_atime_ns, found.st_mtime_ns)
    os.utime(name, ns=times, dir_fd=target, follow_symlinks=False)


def copy_metadata(source: int, target: int) -> None:
    """Give the directory ``target`` what ``source`` has; last, for filling it changes its times."""
    found = os.fstat(source)
    os.fchown(target, found.st_uid, found.st_gid)
    for attribute in os.listxattr(source):
        if kept(attribute):
            os.setxattr(target, attribute, os.getxattr(source, attribute))
    os.fchmod(target, stat.S_IMODE(found.st_mode))
    os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns))
