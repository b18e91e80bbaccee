"""Find what a rule would remove but the image depends on: link targets and environments.

This walks the tree once, by descriptors. It resolves every symbolic link outside a cache, and
checks whether each directory is an environment. Link targets are resolved by the kernel with the
tree as the root (openat2(2), RESOLVE_IN_ROOT), so they cannot lead out of it.

A rule removes each match completely or not at all: a link's target may need the files beside it.
Links inside a match don't count, nor do those in another match that is removed.
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
from hostruntime.image.trees import MAX_DEPTH, Check, TreeTooDeep, open_directory

# A top-level file or directory that identifies a Python (PEP 405) or conda environment.
ENVIRONMENT_MARKS = frozenset({"pyvenv.cfg", "conda-meta"})
_REMOVING_ACTIONS = frozenset({"remove", "remove_files", "unlink"})
# More cache paths than any real image links to; beyond this, all caches are protected.
_MAX_PROTECTED = 20_000
_CACHED_PATHS = 8192
_RESOLVE_FLAGS = os.O_PATH | os.O_DIRECTORY

Units = frozenset[str]


@dataclass(frozen=True)
class _Location:
    """The units that contain a directory, and whether further units may start below it."""

    units: Units
    is_open: bool


@dataclass
class Protected:
    """What rules must spare: paths relative to the root, and the marker files found in the image.

    ``everything`` is set if there were too many to record.
    """

    paths: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)
    everything: bool = False

    def protects(self, rule: Rule, path: str) -> bool:
        """Whether the rule must spare ``path``."""
        if not is_guarded(rule):
            return False
        marker_found = any(name in self.names for name in rule.unless_anywhere)
        return marker_found or self.everything or path in self.paths


def find_protected(root: int, tree: Path, rules: Sequence[Rule], check: Check) -> Protected:
    """Search the tree whose root directory is open as ``root``.

    Raises :class:`TreeTooDeep`, OSError.
    """
    walk = _Walk(root, tree, rules, check)
    walk.visit(root, "", 0)
    return walk.result()


def is_guarded(rule: Rule) -> bool:
    """Whether a rule must spare protected paths."""
    return not rule.unconditional and rule.action in _REMOVING_ACTIONS


def _patterns(rules: Iterable[Rule]) -> dict[str, list[tuple[str, ...]]]:
    """Return guarded rules' paths as tuples of patterns, keyed by the first part, a plain name."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for rule in filter(is_guarded, rules):
        for where in rule.directories:
            for name in rule.names:
                first, *rest = (*where.split("/"), name)
                found.setdefault(first, []).append((first, *rest))
    return found


class _Walk:
    """A walk through a tree.  A *unit* is a path that a rule would remove."""

    def __init__(self, root: int, tree: Path, rules: Sequence[Rule], check: Check) -> None:
        self._root = root
        self._prefix = os.fspath(tree.resolve())
        self._check = check
        self._patterns = _patterns(rules)
        self._marker_files = frozenset(name for rule in rules for name in rule.unless_anywhere)
        self._edges: dict[str, set[str]] = {}
        self._edge_count = 0
        self._found = Protected()
        self._destinations = lru_cache(_CACHED_PATHS)(self._find_destinations)

    def visit(self, directory: int, path: str, depth: int, above: _Location | None = None) -> None:
        """Visit an open directory recursively; ``path`` ends in a slash, or is empty."""
        if depth > MAX_DEPTH:
            raise TreeTooDeep
        here = self._locate(path[:-1]) if above is None or above.is_open else above
        inner: list[str] = []
        with os.scandir(directory) as scan:
            for entry in scan:
                self._check()
                name = entry.name
                if name in ENVIRONMENT_MARKS:
                    self._protect(here.units)
                if entry.is_dir(follow_symlinks=False):
                    inner.append(name)
                elif entry.is_symlink():
                    self._follow_link(path, name, directory, here)
                elif name in self._marker_files:
                    self._found.names.add(name)
        for name in inner:
            with open_directory(name, directory) as found:
                self.visit(found, f"{path}{name}/", depth + 1, here)

    def result(self) -> Protected:
        """Return what is protected, including what that depends on in turn."""
        found = self._found
        pending = list(found.paths)
        while pending:
            for unit in self._edges.pop(pending.pop(), ()):
                if unit not in found.paths:
                    found.paths.add(unit)
                    pending.append(unit)
        return found

    def _follow_link(self, path: str, name: str, directory: int, here: _Location) -> None:
        target = os.readlink(name, dir_fd=directory)
        parent, _, last = target.rpartition("/")
        if last in ("", ".", ".."):
            parent, last = target, ""
        start = f"{parent}/" if target.startswith("/") else f"/{path}{parent}"
        targets: Units = frozenset()
        for destination, where in self._destinations(start):
            targets |= (
                self._units(f"{destination}/{last}") if where.is_open and last else where.units
            )
        if targets:
            source = self._units(path + name) if here.is_open else here.units
            self._add_edges(source, targets - source)

    def _find_destinations(self, start: str) -> list[tuple[str, _Location]]:
        """Return a path's literal and resolved destinations: links along it are in use too."""
        written = os.path.normpath(start).lstrip("/")
        real = self._resolve(start)
        paths = {written} if real is None else {written, real}
        return [(destination, self._locate(destination)) for destination in paths]

    def _add_edges(self, source: Units, targets: Units) -> None:
        if not source:
            self._protect(targets)
        if not source or not targets:
            return
        for unit in source:
            known = self._edges.setdefault(unit, set())
            self._edge_count += len(targets - known)
            known |= targets
        if self._edge_count > _MAX_PROTECTED:
            self._found.everything = True
            self._edges.clear()

    def _protect(self, units: Iterable[str]) -> None:
        self._found.paths.update(units)
        if len(self._found.paths) > _MAX_PROTECTED:
            self._found.everything = True
            self._found.paths.clear()

    def _locate(self, path: str) -> _Location:
        parts = path.split("/") if path else []
        patterns = self._patterns.get(parts[0], ()) if parts else ()
        is_open = any(
            len(pattern) > len(parts) and all(map(fnmatchcase, parts, pattern))
            for pattern in patterns
        )
        return _Location(self._units(path), is_open or not parts)

    def _units(self, path: str) -> Units:
        parts = path.lstrip("/").split("/")
        return frozenset(
            "/".join(parts[: len(pattern)])
            for pattern in self._patterns.get(parts[0], ())
            if len(pattern) <= len(parts) and all(map(fnmatchcase, parts, pattern))
        )

    def _resolve(self, path: str) -> str | None:
        """Resolve a path to a directory in the tree, without leading or trailing slashes."""
        with contextlib.suppress(OSError):
            found = kernel.openat2(
                path, _RESOLVE_FLAGS, dir_fd=self._root, resolve=kernel.RESOLVE_IN_ROOT
            )
            try:
                real = str(Path(f"/proc/self/fd/{found}").readlink())
            finally:
                os.close(found)
            if real == self._prefix or real.startswith(self._prefix + "/"):
                return real.removeprefix(self._prefix).strip("/")
        return None
