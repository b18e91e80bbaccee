"""Taking out of a new tree what the runtime layer lent the build that made it."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hostruntime.image.trees import entries, is_directory, opened, opened_if_directory, status

_COMPARE = 1 << 16


def remove_residue(tree: Path, base: Path, runtime: Path) -> int:
    """Take out of ``tree`` what the runtime layer lent the build; return how many files.

    A recipe that touches a file of the runtime layer without changing it (``chown -R /etc``)
    copies it into the writable layer.  Such a file becomes the base's again, or goes.
    """
    with opened(tree) as tree_fd, opened(base) as base_fd, opened(runtime) as runtime_fd:
        return _remove_residue(tree_fd, base_fd, runtime_fd)


def _remove_residue(tree: int, base: int | None, runtime: int) -> int:
    count = 0
    for entry in entries(runtime):
        if is_directory(entry):
            with contextlib.ExitStack() as stack:
                inner = stack.enter_context(opened_if_directory(entry.name, tree))
                below = stack.enter_context(_inner_base(entry.name, base))
                lent = stack.enter_context(opened(entry.name, runtime))
                count += 0 if inner is None else _remove_residue(inner, below, lent)
        elif _same_content(entry.name, tree, runtime) and not _same_file(entry.name, tree, base):
            os.unlink(entry.name, dir_fd=tree)
            _restore(entry.name, base, tree)
            count += 1
    return count


@contextmanager
def _inner_base(name: str, base: int | None) -> Iterator[int | None]:
    if base is None:
        yield None
        return
    with opened_if_directory(name, base) as found:
        yield found


def _same_content(name: str, one: int, other: int) -> bool:
    try:
        left, right = status(name, one), status(name, other)
    except FileNotFoundError:
        return False
    if stat.S_IFMT(left.st_mode) != stat.S_IFMT(right.st_mode):
        return False
    if stat.S_ISLNK(left.st_mode):
        return os.readlink(name, dir_fd=one) == os.readlink(name, dir_fd=other)
    if not stat.S_ISREG(left.st_mode) or left.st_size != right.st_size:
        return False
    return _equal_bytes(name, one, other)


def _equal_bytes(name: str, one: int, other: int) -> bool:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    with (
        open(os.open(name, flags, dir_fd=one), "rb") as left,  # noqa: PTH123 - a descriptor
        open(os.open(name, flags, dir_fd=other), "rb") as right,  # noqa: PTH123
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
        return os.path.samestat(status(name, tree), status(name, base))
    return False


def _restore(name: str, base: int | None, tree: int) -> None:
    if base is None:
        return
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISDIR(status(name, base).st_mode):
            os.link(name, name, src_dir_fd=base, dst_dir_fd=tree, follow_symlinks=False)
