"""What a rule would remove and the image itself works from: linked into, or an environment.

One walk of the tree, by descriptors: of every symbolic link outside a cache it is asked where it
leads, and of every directory whether it is an environment's.  A link's target is resolved by the
kernel, with the tree as the root (openat2(2), RESOLVE_IN_ROOT), so it cannot lead out of it.

What a rule removes is removed whole or not at all: a file that a link leads to may need what is
beside it.  Links within it do not count, nor those in something else that goes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path

from hostruntime.host import kernel
from hostruntime.image.scrub.rules import Rule
from hostruntime.image.trees import MAX_DEPTH, Check, TreeTooDeep, opened

# The file or directory in its top by which a Python (PEP 405) or conda environment is known.
ENVIRONMENT_MARKS = frozenset({"pyvenv.cfg", "conda-meta"})
_REMOVING = frozenset({"remove", "remove_files", "unlink"})
# More of one image's caches than any real one links into: then all of them are kept.
_MAX_KEPT = 20_000
_REMEMBERED = 8192
_RESOLVED = os.O_PATH | os.O_DIRECTORY

Units = frozenset[str]


@dataclass(frozen=True)
class _Where:
    """What a directory is part of, and whether more may begin directly or further below it."""

    units: Units
    is_open: bool


@dataclass
class Needed:
    """What must stay: paths below the tree's root, and the names in the image that were asked for.

    ``everything`` is set where there was too much to remember.
    """

    paths: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)
    everything: bool = False

    def keeps(self, rule: Rule, path: str) -> bool:
        """Whether the rule must leave ``path`` alone."""
        if not is_guarded(rule):
            return False
        asked = any(name in self.names for name in rule.unless_anywhere)
        return asked or self.everything or path in self.paths


def needed(root: int, tree: Path, rules: Sequence[Rule], check: Check) -> Needed:
    """Look through the tree whose root directory is open as ``root``.

    Raises :class:`TreeTooDeep`, OSError.
    """
    walk = _Walk(root, tree, rules, check)
    walk.visit(root, "", 0)
    return walk.finished()


def is_guarded(rule: Rule) -> bool:
    """Whether a rule must leave alone what is needed."""
    return not rule.regardless and rule.action in _REMOVING


def _patterns(rules: Iterable[Rule]) -> dict[str, list[tuple[str, ...]]]:
    """Each guarded rule's paths, as patterns for their parts, by the first, which is a name."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for rule in filter(is_guarded, rules):
        for where in rule.where:
            for name in rule.names:
                first, *rest = (*where.split("/"), name)
                found.setdefault(first, []).append((first, *rest))
    return found


class _Walk:
    """One look through a tree.  A *unit* is the path of something that a rule would remove."""

    def __init__(self, root: int, tree: Path, rules: Sequence[Rule], check: Check) -> None:
        self._root = root
        self._prefix = os.fspath(tree.resolve())
        self._check = check
        self._patterns = _patterns(rules)
        self._asked = frozenset(name for rule in rules for name in rule.unless_anywhere)
        self._edges: dict[str, set[str]] = {}
        self._edge_count = 0
        self._found = Needed()
        self._ways = lru_cache(_REMEMBERED)(self._find_ways)

    def visit(self, directory: int, path: str, depth: int, above: _Where | None = None) -> None:
        """Look at everything in an open directory; ``path`` ends in a slash, or is empty."""
        if depth > MAX_DEPTH:
            raise TreeTooDeep
        here = self._where(path[:-1]) if above is None or above.is_open else above
        inner: list[str] = []
        with os.scandir(directory) as scan:
            for entry in scan:
                self._check()
                name = entry.name
                if name in ENVIRONMENT_MARKS:
                    self._keep(here.units)
                if entry.is_dir(follow_symlinks=False):
                    inner.append(name)
                elif entry.is_symlink():
                    self._follow(path, name, directory, here)
                elif name in self._asked:
                    self._found.names.add(name)
        for name in inner:
            with opened(name, directory) as found:
                self.visit(found, f"{path}{name}/", depth + 1, here)

    def finished(self) -> Needed:
        """What is needed, and what that needs in turn."""
        found = self._found
        pending = list(found.paths)
        while pending:
            for unit in self._edges.pop(pending.pop(), ()):
                if unit not in found.paths:
                    found.paths.add(unit)
                    pending.append(unit)
        return found

    def _follow(self, path: str, name: str, directory: int, here: _Where) -> None:
        target = os.readlink(name, dir_fd=directory)
        parent, _, last = target.rpartition("/")
        if last in ("", ".", ".."):
            parent, last = target, ""
        start = f"{parent}/" if target.startswith("/") else f"/{path}{parent}"
        led: Units = frozenset()
        for way, where in self._ways(start):
            led |= self._units(f"{way}/{last}") if where.is_open and last else where.units
        if led:
            source = self._units(path + name) if here.is_open else here.units
            self._note(source, led - source)

    def _find_ways(self, start: str) -> list[tuple[str, _Where]]:
        """Where a path leads as it is written, and really: a link on the way to it is used too."""
        written = os.path.normpath(start).lstrip("/")
        real = self._resolve(start)
        ways = {written} if real is None else {written, real}
        return [(way, self._where(way)) for way in ways]

    def _note(self, source: Units, led: Units) -> None:
        if not source:
            self._keep(led)
        if not source or not led:
            return
        for unit in source:
            known = self._edges.setdefault(unit, set())
            self._edge_count += len(led - known)
            known |= led
        if self._edge_count > _MAX_KEPT:
            self._found.everything = True
            self._edges.clear()

    def _keep(self, units: Iterable[str]) -> None:
        self._found.paths.update(units)
        if len(self._found.paths) > _MAX_KEPT:
            self._found.everything = True
            self._found.paths.clear()

    def _where(self, path: str) -> _Where:
        parts = path.split("/") if path else []
        patterns = self._patterns.get(parts[0], ()) if parts else ()
        is_open = any(
            len(one) > len(parts) and all(map(fnmatchcase, parts, one)) for one in patterns
        )
        return _Where(self._units(path), is_open or not parts)

    def _units(self, path: str) -> Units:
        parts = path.lstrip("/").split("/")
        return frozenset(
            "/".join(parts[: len(pattern)])
            for pattern in self._patterns.get(parts[0], ())
            if len(pattern) <= len(parts) and all(map(fnmatchcase, parts, pattern))
        )

    def _resolve(self, path: str) -> str | None:
        """The directory that a path in the tree leads to, without a slash before or after it."""
        with contextlib.suppress(OSError):
            found = kernel.openat2(
                path, _RESOLVED, dir_fd=self._root, resolve=kernel.RESOLVE_IN_ROOT
            )
            try:
                real = str(Path(f"/proc/self/fd/{found}").readlink())
            finally:
                os.close(found)
            if real == self._prefix or real.startswith(self._prefix + "/"):
                return real.removeprefix(self._prefix).strip("/")
        return None
