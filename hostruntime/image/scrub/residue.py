"""Remove the runtime layer's files from a newly captured tree."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hostruntime.image.trees import (
    is_directory,
    list_entries,
    lstat,
    open_directory,
    open_if_directory,
)

_COMPARE = 1 << 16


def remove_residue(tree: Path, base: Path, runtime: Path) -> int:
    """Remove unchanged files of the runtime layer from ``tree``; return how many.

    A recipe that touches such a file without changing it (``chown -R /etc``) copies it into the
    writable layer. It is replaced by the base's file, or removed if the base has none.
    """
    with (
        open_directory(tree) as tree_fd,
        open_directory(base) as base_fd,
        open_directory(runtime) as runtime_fd,
    ):
        return _remove_residue(tree_fd, base_fd, runtime_fd)


def _remove_residue(tree: int, base: int | None, runtime: int) -> int:
    count = 0
    for entry in list_entries(runtime):
        if is_directory(entry):
            with contextlib.ExitStack() as stack:
                inner = stack.enter_context(open_if_directory(entry.name, tree))
                base_inner = stack.enter_context(_open_base(entry.name, base))
                runtime_inner = stack.enter_context(open_directory(entry.name, runtime))
                count += 0 if inner is None else _remove_residue(inner, base_inner, runtime_inner)
        elif _same_content(entry.name, tree, runtime) and not _same_file(entry.name, tree, base):
            os.unlink(entry.name, dir_fd=tree)
            _restore(entry.name, base, tree)
            count += 1
    return count


@contextmanager
def _open_base(name: str, base: int | None) -> Iterator[int | None]:
    if base is None:
        yield None
        return
    with open_if_directory(name, base) as found:
        yield found


def _same_content(name: str, left_fd: int, right_fd: int) -> bool:
    try:
        left, right = lstat(name, left_fd), lstat(name, right_fd)
    except FileNotFoundError:
        return False
    if stat.S_IFMT(left.st_mode) != stat.S_IFMT(right.st_mode):
        return False
    if stat.S_ISLNK(left.st_mode):
        return os.readlink(name, dir_fd=left_fd) == os.readlink(name, dir_fd=right_fd)
    if not stat.S_ISREG(left.st_mode) or left.st_size != right.st_size:
        return False
    return _equal_bytes(name, left_fd, right_fd)


def _equal_bytes(name: str, left_fd: int, right_fd: int) -> bool:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    with (
        open(os.open(name, flags, dir_fd=left_fd), "rb") as left,  # noqa: PTH123 - a descriptor
        open(os.open(name, flags, dir_fd=right_fd), "rb") as right,  # noqa: PTH123
    ):
        while True:
            block = left.read(_COMPARE)
            if block != right.read(_COMPARE):
                return False
            if not block:
                return True


def _same_file(name: str, tree: int, base: int | None) -> bool:
    if base is None:
        return False
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(lstat(name, tree), lstat(name, base))
    return False


def _restore(name: str, base: int | None, tree: int) -> None:
    if base is None:
        return
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISDIR(lstat(name, base).st_mode):
            os.link(name, name, src_dir_fd=base, dst_dir_fd=tree, follow_symlinks=False)
