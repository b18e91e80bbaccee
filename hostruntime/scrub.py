"""What does not belong in an image: caches, logs, history, identities, the build's own traces.

The rules are data (:data:`RULES`).  They are applied to a finished but unpublished tree whose
files may be hard links into a base, so nothing is ever written to an existing inode: a file is
unlinked, or a new empty one is renamed over it.  Paths are walked by directory descriptors and
a symlink is never followed: a rule for ``var/log`` does nothing where ``var/log`` is a link.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from hostruntime.trees import entries, is_directory, opened, opened_if_directory, remove, status

_ELF_CORE = 4  # e_type ET_CORE (elf(5))
_BLOCK = 512
_COMPARE = 1 << 16
_HOMES = ("root", "home/*")


@dataclass(frozen=True)
class Rule:
    """In each directory that matches one of ``where``, deal with the names that match ``names``.

    ``remove`` unlinks files and whole directories.  ``empty`` keeps each file's name, owner and
    mode (a daemon may be able to write its log but not to create it), directories included.
    ``blank`` puts an empty file in the place of whatever has the name.  Patterns are those of
    fnmatch; ``unless`` names what is left alone.
    """

    where: tuple[str, ...]
    names: tuple[str, ...]
    action: Literal["remove", "empty", "blank", "remove_core"] = "remove"
    unless: tuple[str, ...] = ()


def _home(path: str) -> tuple[str, ...]:
    return tuple(f"{home}/{path}" for home in _HOMES)


RULES: tuple[Rule, ...] = (
    # Package managers: what they fetched to install from, never what they installed.
    Rule(("var/lib/apt/lists",), ("*",)),
    Rule(("var/cache/apt/archives",), ("*",)),
    Rule(("var/cache/apt",), ("*.bin",)),
    Rule(_home(".cache"), ("pip", "uv", "yarn", "node-gyp", "pnpm", "pypoetry", "pipenv")),
    Rule(_home(".npm"), ("_cacache", "_logs", "_npx", "_update-notifier-last-checked")),
    Rule(_home(".yarn/berry"), ("cache",)),
    Rule(_home(".yarn"), ("cache",)),
    Rule(("usr/local/share/.cache",), ("yarn",)),
    # The rest of /var/cache may go by the Filesystem Hierarchy Standard, but for two: debconf
    # keeps its database there, and fontconfig's is what makes a program's first start quick.
    Rule(("var/cache",), ("*",), unless=("apt", "debconf", "fontconfig")),
    Rule(("var/cache/debconf",), ("*-old",)),
    # Logs.
    Rule(("var/log/apt",), ("*",)),
    Rule(
        ("var/log",),
        ("dpkg.log*", "alternatives.log*", "bootstrap.log*", "journal", "*.gz", "*.old", "*.[0-9]"),
    ),
    Rule(("var/log",), ("*",), "empty"),
    Rule(("var/lib/dpkg", "var/lib/apt"), ("*-old",)),
    Rule(("var/backups",), ("*",)),
    # Temporary files and what processes left of themselves.
    Rule(("tmp", "var/tmp", "workspace"), ("*",)),
    Rule(("run", "run/*"), ("*.pid",)),
    Rule(("", *_HOMES), ("core", "core.*"), "remove_core"),
    # A person's traces.
    Rule(_HOMES, (".*_history", ".wget-hsts", ".lesshst", ".viminfo", ".sudo_as_admin_successful")),
    # Identities that every machine must have of its own.
    Rule(("etc",), ("machine-id",), "blank"),
    Rule(("var/lib/dbus",), ("machine-id",)),
    Rule(("etc/ssh",), ("ssh_host_*_key", "ssh_host_*_key.pub")),
    Rule(("var/lib/systemd",), ("random-seed", "credential.secret")),
)


def scrub(tree: Path, rules: Sequence[Rule] = RULES) -> int:
    """Apply ``rules`` to the unpublished ``tree``; return the bytes of disk given back.

    Raises OSError.
    """
    freed = 0
    with opened(tree) as root:
        for rule in rules:
            for where in rule.where:
                for directory in _directories(root, [part for part in where.split("/") if part]):
                    freed += _apply(rule, directory)
    return freed


def _directories(parent: int, parts: Sequence[str]) -> Iterator[int]:
    if not parts:
        yield parent
        return
    names = [parts[0]]
    if "*" in parts[0]:
        names = [entry.name for entry in entries(parent) if fnmatchcase(entry.name, parts[0])]
    for name in names:
        with opened_if_directory(name, parent) as found:
            if found is not None:
                yield from _directories(found, parts[1:])


def _apply(rule: Rule, directory: int) -> int:
    act = _ACTIONS[rule.action]
    return sum(
        act(entry.name, directory)
        for entry in entries(directory)
        if _matches(entry.name, rule.names) and not _matches(entry.name, rule.unless)
    )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _empty(name: str, directory: int) -> int:
    found = status(name, directory)
    if stat.S_ISDIR(found.st_mode):
        with opened(name, directory) as inner:
            return sum(_empty(entry.name, inner) for entry in entries(inner))
    if not stat.S_ISREG(found.st_mode) or found.st_size == 0:
        return 0
    return _replace_by_empty(name, directory, found)


def _blank(name: str, directory: int) -> int:
    found = status(name, directory)
    if stat.S_ISREG(found.st_mode):
        return _empty(name, directory)
    freed = remove(name, directory)
    with _new_file(name, directory) as descriptor:
        os.fchmod(descriptor, 0o444)
    return freed


def _remove_core(name: str, directory: int) -> int:
    if not stat.S_ISREG(status(name, directory).st_mode):
        return 0
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        header = os.read(descriptor, 18)
    finally:
        os.close(descriptor)
    order: Literal["little", "big"] = "big" if header[5:6] == b"\2" else "little"
    is_core = header[:4] == b"\x7fELF" and int.from_bytes(header[16:18], order) == _ELF_CORE
    return remove(name, directory) if is_core else 0


_ACTIONS: dict[str, Callable[[str, int], int]] = {
    "remove": remove,
    "empty": _empty,
    "blank": _blank,
    "remove_core": _remove_core,
}


def _replace_by_empty(name: str, directory: int, found: os.stat_result) -> int:
    temporary = f".orkestr-scrub-{os.getpid()}"
    with _new_file(temporary, directory) as descriptor:
        os.fchown(descriptor, found.st_uid, found.st_gid)
        os.fchmod(descriptor, stat.S_IMODE(found.st_mode))
    os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    return found.st_blocks * _BLOCK if found.st_nlink == 1 else 0


@contextmanager
def _new_file(name: str, directory: int) -> Iterator[int]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(name, flags, 0o600, dir_fd=directory)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


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
