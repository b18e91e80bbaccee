"""Walk, measure and remove untrusted directory trees.

Everything here goes by directory descriptors, one name at a time, without following symlinks: a
joined path inside a tenant's tree could be made to point anywhere.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hostruntime.errors import HostFault

# A walk holds a descriptor for each level from the root down. No real tree comes near this limit.
MAX_DEPTH = 200
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
BLOCK_BYTES = 512  # the unit of st_blocks (stat(2))


Check = Callable[[], None]
"""Called periodically during long operations; raises to abort."""


def no_check() -> None:
    """Do nothing: the check of an operation that cannot be aborted."""


class TreeTooDeep(HostFault):
    """Directories are nested deeper than :data:`MAX_DEPTH`."""

    def __init__(self) -> None:
        super().__init__(
            f"Directories are nested more than {MAX_DEPTH} deep: nothing that deep can be part of "
            "an image. Remove them in the recipe's last step."
        )


@dataclass(frozen=True)
class TreeSize:
    """The size of a tree in allocated bytes; an inode counts once however often it is linked.

    ``shared_bytes`` is the part whose inodes are also linked elsewhere; ``size_bytes`` includes it.
    ``file_count`` counts names that are not directories.
    """

    size_bytes: int
    file_count: int
    shared_bytes: int


@contextmanager
def open_directory(name: str | Path, dir_fd: int | None = None) -> Iterator[int]:
    """Open a directory, closed on exit; raises OSError for a symlink or anything else."""
    descriptor = os.open(name, _OPEN_DIRECTORY, dir_fd=dir_fd)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def open_if_directory(name: str, dir_fd: int) -> Iterator[int | None]:
    """Like :func:`open_directory`, but None if there is no directory of that name."""
    try:
        descriptor = os.open(name, _OPEN_DIRECTORY, dir_fd=dir_fd)
    except (FileNotFoundError, NotADirectoryError):
        descriptor = None
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


def list_entries(dir_fd: int) -> list[os.DirEntry[str]]:
    """List a directory's entries, unordered.

    Do not call the entries' ``stat``, which uses the scan's descriptor, closed by now: use
    :func:`lstat`.
    """
    with os.scandir(dir_fd) as scan:
        return list(scan)


def lstat(name: str, dir_fd: int) -> os.stat_result:
    """stat(2) a name without following symlinks."""
    return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)


def is_directory(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is itself a directory; known from the scan, without a system call."""
    return entry.is_dir(follow_symlinks=False)


@dataclass(frozen=True)
class Freed:
    """What a removal freed: disk bytes, and how many names that are not directories."""

    size_bytes: int = 0
    files: int = 0

    def __add__(self, other: Freed) -> Freed:
        return Freed(self.size_bytes + other.size_bytes, self.files + other.files)

    def __bool__(self) -> bool:
        return self.size_bytes > 0 or self.files > 0


def freed_by_unlink(found: os.stat_result) -> Freed:
    """Return what unlinking one name frees: no bytes if the file has other links."""
    return Freed(found.st_blocks * BLOCK_BYTES if found.st_nlink == 1 else 0, 1)


def remove(name: str, dir_fd: int, check: Check = no_check) -> Freed:
    """Remove a file or a whole directory.  Raises :class:`TreeTooDeep`, OSError."""
    return _remove(name, dir_fd, check, 0)


def _remove(name: str, dir_fd: int, check: Check, depth: int) -> Freed:
    if depth > MAX_DEPTH:
        raise TreeTooDeep
    check()
    found = lstat(name, dir_fd)
    if not stat.S_ISDIR(found.st_mode):
        os.unlink(name, dir_fd=dir_fd)
        return freed_by_unlink(found)
    freed = Freed(found.st_blocks * BLOCK_BYTES)
    with open_directory(name, dir_fd) as inner:
        for entry in list_entries(inner):
            freed += _remove(entry.name, inner, check, depth + 1)
    os.rmdir(name, dir_fd=dir_fd)
    return freed


@dataclass(frozen=True)
class Inventory:
    """A tree's inodes with their disk blocks, and its number of names that are not directories.

    ``linked`` are the inodes that also have names outside the tree.
    """

    blocks: Mapping[int, int]
    linked: Set[int]
    file_count: int

    def measure(self) -> TreeSize:
        """Return the sizes; inodes linked elsewhere count as shared."""
        common = sum(map(self.blocks.__getitem__, self.linked))
        return TreeSize(
            sum(self.blocks.values()) * BLOCK_BYTES, self.file_count, common * BLOCK_BYTES
        )


def inventory(tree: Path, check: Check = no_check) -> Inventory:
    """Collect the inodes of ``tree``, calling stat(2) once for each.

    Raises :class:`TreeTooDeep`, OSError, and whatever ``check`` raises.
    """
    blocks: dict[int, int] = {}
    # For files with several names: how many have not been found yet.
    missing: dict[int, int] = {}
    names = 0

    def visit(dir_fd: int, depth: int) -> None:
        nonlocal names
        if depth > MAX_DEPTH:
            raise TreeTooDeep
        check()
        own = os.fstat(dir_fd)
        blocks[own.st_ino] = own.st_blocks
        with os.scandir(dir_fd) as scan:
            directories = []
            for entry in scan:
                if entry.is_dir(follow_symlinks=False):
                    directories.append(entry.name)
                    continue
                names += 1
                check()
                inode = entry.inode()
                if inode in missing:
                    missing[inode] -= 1
                else:
                    found = entry.stat(follow_symlinks=False)
                    blocks[inode] = found.st_blocks
                    if found.st_nlink > 1:
                        missing[inode] = found.st_nlink - 1
        for name in directories:
            with open_directory(name, dir_fd) as inner:
                visit(inner, depth + 1)

    with open_directory(tree) as root:
        visit(root, 0)
    return Inventory(blocks, {inode for inode, count in missing.items() if count > 0}, names)


def measure(tree: Path, check: Check = no_check) -> TreeSize:
    """Return the sizes of ``tree``; raises like :func:`inventory`."""
    return inventory(tree, check).measure()


def child_path(name: str, dir_fd: int) -> str:
    """Return a path for calls that take no directory descriptor; one name deep, so still safe."""
    return f"/proc/self/fd/{dir_fd}/{name}"


def attributes(name: str, dir_fd: int) -> list[str]:
    """List a file's extended attributes without following symlinks (xattr(7))."""
    return os.listxattr(child_path(name, dir_fd), follow_symlinks=False)
