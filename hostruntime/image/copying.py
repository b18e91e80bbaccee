"""Copy single files with all their metadata, to another file system or to a new inode.

Everything goes by directory descriptors, one name at a time, without following links. A capture
copies hundreds of thousands of small files, and the cost of each is its number of system calls: a
small file is read and written in one call each, and owner, mode and attributes are only set where
the new file differs.
"""

from __future__ import annotations

import os
import stat

from hostruntime.host.progress import Progress
from hostruntime.image.content_hash import ContentHashCache, content_hash
from hostruntime.image.sparse import copy_range, data_extents
from hostruntime.image.trees import BLOCK_BYTES, Check, attributes, child_path, lstat

CAPABILITY = "security.capability"
# Files up to this size are read at once; the kernel copies larger ones.
SMALL_BYTES = 128 * 1024
_CHUNK_BYTES = 16 * 1024 * 1024
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOATIME | os.O_CLOEXEC
_WRITE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def is_preserved(attribute: str) -> bool:
    """Whether an extended attribute belongs to the file, not to the host or the overlay."""
    return attribute == CAPABILITY or not attribute.startswith(("trusted.", "security."))


class Copier:
    """Copies files, hashes small ones and counts; ``check`` may raise to abort."""

    def __init__(self, check: Check, known: ContentHashCache, progress: Progress) -> None:
        self._check = check
        self._known = known
        self._progress = progress

    def copy(self, name: str, source: int, target: int) -> None:
        """Copy a symlink, a FIFO or a regular file to the same name.  Raises OSError."""
        found = lstat(name, source)
        if stat.S_ISREG(found.st_mode):
            descriptor = open_file(name, source)
            try:
                self.copy_file(descriptor, os.fstat(descriptor), name, target)
            finally:
                os.close(descriptor)
        else:
            copy_special(name, source, target, found)

    def copy_file(self, old: int, found: os.stat_result, name: str, target: int) -> None:
        """Copy the regular file open as ``old``, whose fstat is ``found``.  Raises OSError."""
        new = os.open(name, _WRITE_FLAGS, stat.S_IMODE(found.st_mode) & 0o777, dir_fd=target)
        try:
            digest = self._copy_content(old, new, found)
            bare = _copy_metadata_of_file(old, new, found)
            os.utime(new, ns=(found.st_atime_ns, found.st_mtime_ns))
            if bare and digest is not None:
                self._known.add(os.fstat(new), digest)
        finally:
            os.close(new)
        self._progress.bytes += found.st_size

    def _copy_content(self, old: int, new: int, found: os.stat_result) -> bytes | None:
        """Copy a file's content; return its hash if the content had to be read anyway."""
        size = found.st_size
        if size == 0:
            return None
        # Fewer blocks than bytes means holes, which are preserved.
        if size <= SMALL_BYTES and found.st_blocks * BLOCK_BYTES >= size:
            data = os.read(old, size)
            written = os.write(new, data)
            if written == len(data) == size:
                return content_hash(data)
        for start, end in data_extents(old):
            for offset in range(start, end, _CHUNK_BYTES):
                self._check()
                copy_range(old, new, offset, min(offset + _CHUNK_BYTES, end))
        os.ftruncate(new, size)
        return None


def open_file(name: str, directory: int) -> int:
    """Open a regular file read-only.  Raises OSError."""
    return os.open(name, _READ_FLAGS, dir_fd=directory)


def _copy_metadata_of_file(old: int, new: int, found: os.stat_result) -> bool:
    """Copy owner, attributes and mode, in this order; return whether there are no attributes."""
    current = os.fstat(new)
    if (current.st_uid, current.st_gid) != (found.st_uid, found.st_gid):
        os.fchown(new, found.st_uid, found.st_gid)
    names = [attribute for attribute in os.listxattr(old) if is_preserved(attribute)]
    for attribute in names:
        os.setxattr(new, attribute, os.getxattr(old, attribute))
    if current.st_mode != found.st_mode:
        os.fchmod(new, stat.S_IMODE(found.st_mode))
    return not names


def copy_special(name: str, source: int, target: int, found: os.stat_result) -> None:
    """Copy a symlink or a FIFO, whose lstat is ``found``.  Raises OSError."""
    if stat.S_ISLNK(found.st_mode):
        os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
    else:
        os.mkfifo(name, dir_fd=target)
    os.chown(name, found.st_uid, found.st_gid, dir_fd=target, follow_symlinks=False)
    for attribute in filter(is_preserved, attributes(name, source)):
        value = os.getxattr(child_path(name, source), attribute, follow_symlinks=False)
        os.setxattr(child_path(name, target), attribute, value, follow_symlinks=False)
    if not stat.S_ISLNK(found.st_mode):
        os.chmod(child_path(name, target), stat.S_IMODE(found.st_mode))  # noqa: PTH101 - by descriptor
    times = (found.st_atime_ns, found.st_mtime_ns)
    os.utime(name, ns=times, dir_fd=target, follow_symlinks=False)


def copy_metadata(source: int, target: int) -> None:
    """Copy a directory's metadata; do this last, as adding entries changes its times."""
    found = os.fstat(source)
    os.fchown(target, found.st_uid, found.st_gid)
    for attribute in os.listxattr(source):
        if is_preserved(attribute):
            os.setxattr(target, attribute, os.getxattr(source, attribute))
    os.fchmod(target, stat.S_IMODE(found.st_mode))
    os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns))
