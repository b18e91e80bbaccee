"""What does not belong in an image: caches, logs, history, identities, the build's own traces.

The rules are data (:mod:`hostruntime.image.scrub.rules`), and what they must leave alone, because
the image works from it, is found by looking (:mod:`hostruntime.image.scrub.needs`).  They are
applied to a finished but unpublished tree whose files may be hard links into a base, so nothing is
ever written to an existing inode: a file is unlinked, or a new empty one is renamed over it.  Paths
are walked by directory descriptors and a symlink is never followed: a rule for ``var/log`` does
nothing where ``var/log`` is a link.
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

from hostruntime.image.scrub.needs import Needed, is_guarded, needed
from hostruntime.image.scrub.residue import remove_residue
from hostruntime.image.scrub.rules import RULES, Action, Rule
from hostruntime.image.trees import (
    MAX_DEPTH,
    Check,
    Freed,
    TreeTooDeep,
    entries,
    freed_by_unlinking,
    go_on,
    is_directory,
    opened,
    opened_if_directory,
    remove,
    status,
)

__all__ = ["RULES", "Rule", "remove_residue", "scrub"]

_ELF_CORE = 4  # e_type ET_CORE (elf(5))


@dataclass(frozen=True)
class _Place:
    """An open directory that a rule is about; ``path`` ends in a slash, or is empty."""

    directory: int
    path: str


def scrub(tree: Path, rules: Sequence[Rule] = RULES, check: Check = go_on) -> dict[str, Freed]:
    """Apply ``rules`` to the unpublished ``tree``; return what went, by the rules' ``what``.

    Raises :class:`TreeTooDeep`, OSError.
    """
    freed: dict[str, Freed] = {}
    with opened(tree) as root:
        # Most builds leave nothing that must be asked about first.
        anything = any(_finds_anything(rule, root) for rule in rules if is_guarded(rule))
        keep = needed(root, tree, rules, check) if anything else Needed()
        for rule in rules:
            for place in _places(rule, root):
                gone = _apply(rule, place, keep, check)
                freed[rule.what] = freed.get(rule.what, Freed()) + gone
    return {what: gone for what, gone in freed.items() if gone}


def _places(rule: Rule, root: int) -> Iterator[_Place]:
    for where in rule.where:
        yield from _directories(_Place(root, ""), [part for part in where.split("/") if part])


def _directories(parent: _Place, parts: Sequence[str]) -> Iterator[_Place]:
    if not parts:
        yield parent
        return
    names = [parts[0]]
    if "*" in parts[0]:
        listed = entries(parent.directory)
        names = [entry.name for entry in listed if fnmatchcase(entry.name, parts[0])]
    for name in names:
        with opened_if_directory(name, parent.directory) as found:
            if found is not None:
                yield from _directories(_Place(found, f"{parent.path}{name}/"), parts[1:])


def _matching(rule: Rule, directory: int) -> Iterator[os.DirEntry[str]]:
    for entry in entries(directory):
        if _matches(entry.name, rule.names) and not _matches(entry.name, rule.unless):
            yield entry


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _finds_anything(rule: Rule, root: int) -> bool:
    """Whether there is anything to remove but an empty directory."""
    return any(
        not is_directory(entry) or _has_entries(entry.name, place.directory)
        for place in _places(rule, root)
        for entry in _matching(rule, place.directory)
    )


def _has_entries(name: str, directory: int) -> bool:
    with opened_if_directory(name, directory) as found:
        if found is None:
            return False
        with os.scandir(found) as scan:
            return any(scan)


def _apply(rule: Rule, place: _Place, keep: Needed, check: Check) -> Freed:
    act, freed = _ACTIONS[rule.action], Freed()
    if any(_has_entries(name, place.directory) for name in rule.unless_beside):
        return freed
    for entry in _matching(rule, place.directory):
        check()
        if not keep.keeps(rule, place.path + entry.name):
            freed += act(entry.name, place.directory, check)
    return freed


def _unlink(name: str, directory: int, check: Check) -> Freed:
    if stat.S_ISDIR(status(name, directory).st_mode):
        return Freed()
    return remove(name, directory, check)


def _remove_files(name: str, directory: int, check: Check, depth: int = 0) -> Freed:
    if depth > MAX_DEPTH:
        raise TreeTooDeep
    check()
    found = status(name, directory)
    if stat.S_ISREG(found.st_mode):
        return remove(name, directory, check)
    freed = Freed()
    if stat.S_ISDIR(found.st_mode):
        with opened(name, directory) as inner:
            for entry in entries(inner):
                freed += _remove_files(entry.name, inner, check, depth + 1)
    return freed


def _empty(name: str, directory: int, check: Check, depth: int = 0) -> Freed:
    if depth > MAX_DEPTH:
        raise TreeTooDeep
    check()
    found = status(name, directory)
    if stat.S_ISDIR(found.st_mode):
        freed = Freed()
        with opened(name, directory) as inner:
            for entry in entries(inner):
                freed += _empty(entry.name, inner, check, depth + 1)
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
    return freed_by_unlinking(found)


@contextmanager
def _new_file(name: str, directory: int) -> Iterator[int]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(name, flags, 0o600, dir_fd=directory)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
