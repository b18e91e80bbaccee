"""Walking, measuring and removing directory trees that strangers filled.

Everything here goes by directory descriptors, one name at a time, and follows no symlink: a path
joined together inside a tenant's tree could be made to point anywhere.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hostruntime.errors import HostFault

# Descriptors are held open from the root of a walk down to where it is.  No real tree comes near.
MAX_DEPTH = 200
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
BLOCK_BYTES = 512  # the unit of st_blocks (stat(2))


Check = Callable[[], None]
"""Called between the pieces of long work; it raises to end that."""


def go_on() -> None:
    """The check that never ends anything."""


class TreeTooDeep(HostFault):
    """Directories are nested deeper than :data:`MAX_DEPTH`."""

    def __init__(self) -> None:
        super().__init__(
            f"Directories are nested more than {MAX_DEPTH} deep: nothing that deep can be part of "
            "an image. Remove them in the recipe's last step."
        )


@dataclass(frozen=True)
class Measure:
    """What a tree holds.  Bytes are disk blocks, an inode counted once however often linked.

    ``shared_bytes`` is the part whose inodes are also linked elsewhere; ``size_bytes`` includes it.
    ``file_count`` counts names that are not directories.
    """

    size_bytes: int
    file_count: int
    shared_bytes: int


@contextmanager
def opened(name: str | Path, dir_fd: int | None = None) -> Iterator[int]:
    """A directory's descriptor, closed at the end; a symlink or anything else raises OSError."""
    descriptor = os.open(name, _OPEN_DIRECTORY, dir_fd=dir_fd)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def opened_if_directory(name: str, dir_fd: int) -> Iterator[int | None]:
    """Like :func:`opened`, None where there is no directory of that name."""
    with contextlib.ExitStack() as stack:
        descriptor: int | None = None
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            descriptor = stack.enter_context(opened(name, dir_fd))
        yield descriptor


def entries(dir_fd: int) -> list[os.DirEntry[str]]:
    """What is in a directory, as scandir says it; in no order.

    The entries' ``stat`` goes through the scan's own descriptor, which is closed: use
    :func:`status`.
    """
    with os.scandir(dir_fd) as scan:
        return list(scan)


def status(name: str, dir_fd: int) -> os.stat_result:
    """stat(2) of a name, no symlink followed."""
    return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)


def is_directory(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a directory itself; from the scan, without a system call."""
    return entry.is_dir(follow_symlinks=False)


@dataclass(frozen=True)
class Freed:
    """What removing gave back: bytes of disk, and how many names that are not directories."""

    size_bytes: int = 0
    files: int = 0

    def __add__(self, other: Freed) -> Freed:
        return Freed(self.size_bytes + other.size_bytes, self.files + other.files)

    def __bool__(self) -> bool:
        return self.size_bytes > 0 or self.files > 0


def freed_by_unlinking(found: os.stat_result) -> Freed:
    """What goes with one name of a file: a file that is linked elsewhere gives nothing back."""
    return Freed(found.st_blocks * BLOCK_BYTES if found.st_nlink == 1 else 0, 1)


def remove(name: str, dir_fd: int, check: Check = go_on) -> Freed:
    """Remove a file or a whole directory.  Raises :class:`TreeTooDeep`, OSError."""
    return _remove(name, dir_fd, check, 0)


def _remove(name: str, dir_fd: int, check: Check, depth: int) -> Freed:
    if depth > MAX_DEPTH:
        raise TreeTooDeep
    check()
    found = status(name, dir_fd)
    if not stat.S_ISDIR(found.st_mode):
        os.unlink(name, dir_fd=dir_fd)
        return freed_by_unlinking(found)
    freed = Freed(found.st_blocks * BLOCK_BYTES)
    with opened(name, dir_fd) as inner:
        for entry in entries(inner):
            freed += _remove(entry.name, inner, check, depth + 1)
    os.rmdir(name, dir_fd=dir_fd)
    return freed


@dataclass(frozen=True)
class Inventory:
    """What is in a tree: its inodes with their disk blocks, and how many names are no directories.

    ``linked`` are the inodes that have more names than the tree itself holds.
    """

    blocks: Mapping[int, int]
    linked: Set[int]
    file_count: int

    def measure(self) -> Measure:
        """The sizes; what is linked elsewhere is shared."""
        common = sum(map(self.blocks.__getitem__, self.linked))
        return Measure(
            sum(self.blocks.values()) * BLOCK_BYTES, self.file_count, common * BLOCK_BYTES
        )


def inventory(tree: Path, check: Check = go_on) -> Inventory:
    """Look at every inode of ``tree`` once, by stat(2).

    Raises :class:`TreeTooDeep`, OSError, and what ``check`` does.
    """
    blocks: dict[int, int] = {}
    # Of files with several names: how many have not been met yet.
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
            with opened(name, dir_fd) as inner:
                visit(inner, depth + 1)

    with opened(tree) as root:
        visit(root, 0)
    return Inventory(blocks, {inode for inode, count in missing.items() if count > 0}, names)


def measure(tree: Path, check: Check = go_on) -> Measure:
    """The sizes of ``tree``; raises as :func:`inventory`."""
    return inventory(tree, check).measure()


def child_path(name: str, dir_fd: int) -> str:
    """A path for the calls that take no directory descriptor; one name deep, so still safe."""
    return f"/proc/self/fd/{dir_fd}/{name}"


def attributes(name: str, dir_fd: int) -> list[str]:
    """The names of a file's extended attributes, no symlink followed (xattr(7))."""
    return os.listxattr(child_path(name, dir_fd), follow_symlinks=False)
