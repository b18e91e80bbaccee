"""Remove what does not belong in an image: caches, logs, history, identities, traces of the build.

The rules are data (:mod:`hostruntime.image.scrub.rules`); what they must spare, because the image
depends on it, is determined from the tree (:mod:`hostruntime.image.scrub.references`). They are
applied to a finished but unpublished tree whose files may be hard links into a base, so nothing is
ever written to an existing inode: a file is unlinked, or a new empty one is renamed over it. Paths
are walked by directory descriptors without following symlinks: a rule for ``var/log`` does nothing
if ``var/log`` is a link.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from hostruntime.image.scrub.references import Protected, find_protected, is_guarded
from hostruntime.image.scrub.residue import remove_residue
from hostruntime.image.scrub.rules import RULES, Action, Rule
from hostruntime.image.trees import (
    MAX_DEPTH,
    Check,
    Freed,
    TreeTooDeep,
    freed_by_unlink,
    is_directory,
    list_entries,
    lstat,
    no_check,
    open_directory,
    open_if_directory,
    remove,
)

__all__ = ["RULES", "Rule", "remove_residue", "scrub"]

_ELF_CORE = 4  # e_type ET_CORE (elf(5))


@dataclass(frozen=True)
class _Place:
    """An open directory that a rule applies to; ``path`` ends in a slash, or is empty."""

    directory: int
    path: str


def scrub(tree: Path, rules: Sequence[Rule] = RULES, check: Check = no_check) -> dict[str, Freed]:
    """Apply ``rules`` to the unpublished ``tree``; return what was freed, by rule label.

    Raises :class:`TreeTooDeep`, OSError.
    """
    freed: dict[str, Freed] = {}
    with open_directory(tree) as root:
        # Finding references is slow, and most builds leave nothing that needs it.
        any_guarded = any(_finds_anything(rule, root) for rule in rules if is_guarded(rule))
        protected = find_protected(root, tree, rules, check) if any_guarded else Protected()
        for rule in rules:
            for place in _places(rule, root):
                freed_here = _apply(rule, place, protected, check)
                freed[rule.label] = freed.get(rule.label, Freed()) + freed_here
    return {what: freed_here for what, freed_here in freed.items() if freed_here}


def _places(rule: Rule, root: int) -> Iterator[_Place]:
    for where in rule.directories:
        yield from _directories(_Place(root, ""), [part for part in where.split("/") if part])


def _directories(parent: _Place, parts: Sequence[str]) -> Iterator[_Place]:
    if not parts:
        yield parent
        return
    names = [parts[0]]
    if "*" in parts[0]:
        listed = list_entries(parent.directory)
        names = [entry.name for entry in listed if fnmatchcase(entry.name, parts[0])]
    for name in names:
        with open_if_directory(name, parent.directory) as found:
            if found is not None:
                yield from _directories(_Place(found, f"{parent.path}{name}/"), parts[1:])


def _matching(rule: Rule, directory: int) -> Iterator[os.DirEntry[str]]:
    for entry in list_entries(directory):
        if _matches(entry.name, rule.names) and not _matches(entry.name, rule.unless):
            yield entry


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _finds_anything(rule: Rule, root: int) -> bool:
    """Whether there is anything to remove other than an empty directory."""
    return any(
        not is_directory(entry) or _has_entries(entry.name, place.directory)
        for place in _places(rule, root)
        for entry in _matching(rule, place.directory)
    )


def _has_entries(name: str, directory: int) -> bool:
    with open_if_directory(name, directory) as found:
        if found is None:
            return False
        with os.scandir(found) as scan:
            return any(scan)


def _apply(rule: Rule, place: _Place, protected: Protected, check: Check) -> Freed:
    act, freed = _ACTIONS[rule.action], Freed()
    if any(_has_entries(name, place.directory) for name in rule.unless_beside):
        return freed
    for entry in _matching(rule, place.directory):
        check()
        if not protected.protects(rule, place.path + entry.name):
            freed += act(entry.name, place.directory, check)
    return freed


def _unlink(name: str, directory: int, check: Check) -> Freed:
    if stat.S_ISDIR(lstat(name, directory).st_mode):
        return Freed()
    return remove(name, directory, check)


def _remove_files(name: str, directory: int, check: Check, depth: int = 0) -> Freed:
    if depth > MAX_DEPTH:
        raise TreeTooDeep
    check()
    found = lstat(name, directory)
    if stat.S_ISREG(found.st_mode):
        return remove(name, directory, check)
    freed = Freed()
    if stat.S_ISDIR(found.st_mode):
        with open_directory(name, directory) as inner:
            for entry in list_entries(inner):
                freed += _remove_files(entry.name, inner, check, depth + 1)
    return freed


def _empty(name: str, directory: int, check: Check, depth: int = 0) -> Freed:
    if depth > MAX_DEPTH:
        raise TreeTooDeep
    check()
    found = lstat(name, directory)
    if stat.S_ISDIR(found.st_mode):
        freed = Freed()
        with open_directory(name, directory) as inner:
            for entry in list_entries(inner):
                freed += _empty(entry.name, inner, check, depth + 1)
        return freed
    if not stat.S_ISREG(found.st_mode) or found.st_size == 0:
        return Freed()
    return _replace_by_empty(name, directory, found)


def _blank(name: str, directory: int, check: Check) -> Freed:
    found = lstat(name, directory)
    if stat.S_ISREG(found.st_mode):
        return _empty(name, directory, check)
    freed = remove(name, directory, check)
    with _new_file(name, directory) as descriptor:
        os.fchmod(descriptor, 0o444)
    return freed


def _remove_core(name: str, directory: int, check: Check) -> Freed:
    if not stat.S_ISREG(lstat(name, directory).st_mode):
        return Freed()
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        header = os.read(descriptor, 18)
    finally:
        os.close(descriptor)
    order: Literal["little", "big"] = "big" if header[5:6] == b"\2" else "little"
    is_core = header[:4] == b"\x7fELF" and int.from_bytes(header[16:18], order) == _ELF_CORE
    return remove(name, directory, check) if is_core else Freed()


_ACTIONS: dict[Action, Callable[[str, int, Check], Freed]] = {
    "remove": remove,
    "remove_files": _remove_files,
    "unlink": _unlink,
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
    return freed_by_unlink(found)


@contextmanager
def _new_file(name: str, directory: int) -> Iterator[int]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(name, flags, 0o600, dir_fd=directory)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
