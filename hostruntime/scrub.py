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

from hostruntime.trees import (
    Check,
    Freed,
    entries,
    freed_by_unlinking,
    go_on,
    is_directory,
    opened,
    opened_if_directory,
    remove,
    status,
)

_ELF_CORE = 4  # e_type ET_CORE (elf(5))
_COMPARE = 1 << 16
_HOMES = ("root", "home/*")


@dataclass(frozen=True)
class Rule:
    """In each directory that matches one of ``where``, deal with the names that match ``names``.

    ``what`` says in a few words what that is; several rules may share it.  ``remove`` unlinks
    files and whole directories.  ``empty`` keeps each file's name, owner and mode (a daemon may be
    able to write its log but not to create it), directories included.  ``blank`` puts an empty
    file in the place of whatever has the name.  Patterns are those of fnmatch; ``unless`` names
    what is left alone.
    """

    what: str
    where: tuple[str, ...]
    names: tuple[str, ...]
    action: Literal["remove", "empty", "blank", "remove_core"] = "remove"
    unless: tuple[str, ...] = ()


def _home(path: str) -> tuple[str, ...]:
    return tuple(f"{home}/{path}" for home in _HOMES)


RULES: tuple[Rule, ...] = (
    # Package managers: what they fetched to install from, never what they installed.
    Rule("apt package lists", ("var/lib/apt/lists",), ("*",)),
    Rule("downloaded apt packages", ("var/cache/apt/archives",), ("*",)),
    Rule("apt caches", ("var/cache/apt",), ("*.bin",)),
    Rule("pip cache", _home(".cache"), ("pip",)),
    Rule(
        "other package managers' caches",
        _home(".cache"),
        ("uv", "yarn", "node-gyp", "pnpm", "pypoetry", "pipenv"),
    ),
    Rule(
        "npm cache", _home(".npm"), ("_cacache", "_logs", "_npx", "_update-notifier-last-checked")
    ),
    Rule("other package managers' caches", _home(".yarn/berry"), ("cache",)),
    Rule("other package managers' caches", _home(".yarn"), ("cache",)),
    Rule("other package managers' caches", ("usr/local/share/.cache",), ("yarn",)),
    # The rest of /var/cache may go by the Filesystem Hierarchy Standard, but for two: debconf
    # keeps its database there, and fontconfig's is what makes a program's first start quick.
    Rule("system caches", ("var/cache",), ("*",), unless=("apt", "debconf", "fontconfig")),
    Rule("system caches", ("var/cache/debconf",), ("*-old",)),
    # Logs.
    Rule("logs", ("var/log/apt",), ("*",)),
    Rule(
        "logs",
        ("var/log",),
        ("dpkg.log*", "alternatives.log*", "bootstrap.log*", "journal", "*.gz", "*.old", "*.[0-9]"),
    ),
    Rule("logs", ("var/log",), ("*",), "empty"),
    Rule("package databases' backups", ("var/lib/dpkg", "var/lib/apt"), ("*-old",)),
    Rule("package databases' backups", ("var/backups",), ("*",)),
    # Temporary files and what processes left of themselves.
    Rule("temporary files", ("tmp", "var/tmp", "workspace"), ("*",)),
    Rule("process id files", ("run", "run/*"), ("*.pid",)),
    Rule("core dumps", ("", *_HOMES), ("core", "core.*"), "remove_core"),
    # A person's traces.
    Rule(
        "shell and program history",
        _HOMES,
        (".*_history", ".wget-hsts", ".lesshst", ".viminfo", ".sudo_as_admin_successful"),
    ),
    # Identities that every machine must have of its own.
    Rule("machine ids", ("etc",), ("machine-id",), "blank"),
    Rule("machine ids", ("var/lib/dbus",), ("machine-id",)),
    Rule("SSH host keys", ("etc/ssh",), ("ssh_host_*_key", "ssh_host_*_key.pub")),
    Rule("random seeds", ("var/lib/systemd",), ("random-seed", "credential.secret")),
)


def scrub(tree: Path, rules: Sequence[Rule] = RULES, check: Check = go_on) -> dict[str, Freed]:
    """Apply ``rules`` to the unpublished ``tree``; return what went, by the rules' ``what``.

    Raises OSError.
    """
    freed: dict[str, Freed] = {}
    with opened(tree) as root:
        for rule in rules:
            for where in rule.where:
                for directory in _directories(root, [part for part in where.split("/") if part]):
                    freed[rule.what] = freed.get(rule.what, Freed()) + _apply(
                        rule, directory, check
                    )
    return {what: gone for what, gone in freed.items() if gone}


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


def _apply(rule: Rule, directory: int, check: Check) -> Freed:
    act, freed = _ACTIONS[rule.action], Freed()
    for entry in entries(directory):
        if _matches(entry.name, rule.names) and not _matches(entry.name, rule.unless):
            check()
            freed += act(entry.name, directory, check)
    return freed


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _empty(name: str, directory: int, check: Check) -> Freed:
    check()
    found = status(name, directory)
    if stat.S_ISDIR(found.st_mode):
        freed = Freed()
        with opened(name, directory) as inner:
            for entry in entries(inner):
                freed += _empty(entry.name, inner, check)
        return freed
    if not stat.S_ISREG(found.st_mode) or found.st_size == 0:
        return Freed()
    return _replace_by_empty(name, directory, found)


def _blank(name: str, directory: int, check: Check) -> Freed:
    found = status(name, directory)
    if stat.S_ISREG(found.st_mode):
        return _empty(name, directory, check)
    freed = remove(name, directory, check)
    with _new_file(name, directory) as descriptor:
        os.fchmod(descriptor, 0o444)
    return freed


def _remove_core(name: str, directory: int, check: Check) -> Freed:
    if not stat.S_ISREG(status(name, directory).st_mode):
        return Freed()
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        header = os.read(descriptor, 18)
    finally:
        os.close(descriptor)
    order: Literal["little", "big"] = "big" if header[5:6] == b"\2" else "little"
    is_core = header[:4] == b"\x7fELF" and int.from_bytes(header[16:18], order) == _ELF_CORE
    return remove(name, directory, check) if is_core else Freed()


_ACTIONS: dict[str, Callable[[str, int, Check], Freed]] = {
    "remove": remove,
    "empty": _empty,
    "blank": _blank,
    "remove_core": _remove_core,
}


def _replace_by_empty(name: str, directory: int, found: os.stat_result) -> Freed:
    temporary = f".orkestr-scrub-{os.getpid()}"
    with _new_file(temporary, directory) as descriptor:
        os.fchown(descriptor, found.st_uid, found.st_gid)
        os.fchmod(descriptor, stat.S_IMODE(found.st_mode))
    os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    return freed_by_unlinking(found)


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
