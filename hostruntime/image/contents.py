"""List what is installed in a finished tree, by reading the package managers' own records.

Nothing in the tree is trusted or run: directories are walked by descriptor without following
links, only regular files are read, and only a bounded part of each. Malformed records are skipped;
if there are too many, the first are kept and ``truncated`` is set.
"""

from __future__ import annotations

import itertools
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from hostruntime.image.trees import (
    Check,
    is_directory,
    list_entries,
    no_check,
    open_directory,
    open_if_directory,
)

MAX_PACKAGES = 5_000
NAME_CHARACTERS = 200
VERSION_CHARACTERS = 100
# Limits on the records examined, valid or not, and on the directories that match one pattern.
_MAX_CANDIDATES = 20_000
_MAX_DIRECTORIES = 500
_MAX_STATUS_BYTES = 32 * 1024 * 1024
_MAX_RECORD_BYTES = 256 * 1024

Package = tuple[str, str]
Candidates = Iterator[Package | None]

# Where Python packages live: the system's, those `pip` installs system-wide and for root, and
# virtual environments in the usual places. Our bases have their CPython in usr/local.
_PYTHON_HOMES = (
    *("usr", "usr/local", "opt/*", "opt/*/envs/*", "srv/*", "root/.local", "home/*/.local"),
    *("root/*", "home/*/*", "app/*", "venv", "root/.venv"),
)
_SITE_DIRECTORIES = tuple(
    f"{home}/lib/python3*/{kind}-packages" for home in _PYTHON_HOMES for kind in ("site", "dist")
)
# `npm install --global`, in our node-22 and with Debian's npm.
_NODE_DIRECTORIES = ("usr/local/lib/node_modules", "usr/lib/node_modules")


@dataclass(frozen=True)
class Packages:
    """What is installed, by package manager (dpkg, pip, npm), sorted by name."""

    installed: Mapping[str, tuple[Package, ...]]
    truncated: bool

    def to_json(self) -> dict[str, Any]:
        """Return the fields as written to events and ``contents.json``."""
        packages = {
            manager: [list(package) for package in found]
            for manager, found in self.installed.items()
        }
        return {"packages": packages, "truncated": self.truncated}


def installed_packages(tree: Path, check: Check = no_check) -> Packages:
    """List the packages in ``tree``. Raises OSError, and whatever ``check`` raises."""
    found: dict[str, tuple[Package, ...]] = {}
    truncated = False
    with open_directory(tree) as root:
        for manager, candidates in _MANAGERS.items():
            found[manager], more = _collect(candidates(root), check)
            truncated = truncated or more
    return Packages(found, truncated)


def _collect(candidates: Candidates, check: Check) -> tuple[tuple[Package, ...], bool]:
    found: set[Package] = set()
    for seen, candidate in enumerate(candidates):
        check()
        if seen >= _MAX_CANDIDATES or len(found) >= MAX_PACKAGES:
            return _sort_packages(found), True
        if candidate is not None:
            found.add(candidate)
    return _sort_packages(found), False


def _sort_packages(found: set[Package]) -> tuple[Package, ...]:
    return tuple(sorted(found, key=lambda package: (package[0].lower(), package)))


# The managers ------------------------------------------------------------------------------


def _dpkg(root: int) -> Candidates:
    """The paragraphs of dpkg's status file (dpkg(1), deb-status)."""
    for directory in _directories(root, "var/lib/dpkg"):
        text = _read_text("status", directory, _MAX_STATUS_BYTES)
        for paragraph in (text or "").split("\n\n"):
            fields = _fields(paragraph)
            if fields.get("status", "").endswith(" installed"):
                yield _package(fields.get("package"), fields.get("version"))


def _pip(root: int) -> Candidates:
    """Distributions as pip finds them (PyPA "Recording installed projects", older formats)."""
    for pattern in _SITE_DIRECTORIES:
        for directory in _directories(root, pattern):
            for entry in _matching_entries(directory, "*.dist-info", "*.egg-info"):
                yield _distribution(entry, directory)


def _distribution(entry: os.DirEntry[str], directory: int) -> Package | None:
    if not is_directory(entry):
        fields = _fields(_read_text(entry.name, directory, _MAX_RECORD_BYTES) or "")
        return _package(fields.get("name"), fields.get("version"))
    with open_if_directory(entry.name, directory) as inner:
        if inner is None:
            return None
        record = "METADATA" if entry.name.endswith(".dist-info") else "PKG-INFO"
        fields = _fields(_read_text(record, inner, _MAX_RECORD_BYTES) or "")
        return _package(fields.get("name"), fields.get("version"))


def _npm(root: int) -> Candidates:
    """Packages directly in npm's global node_modules, including scoped ones (npm-folders(5))."""
    for pattern in _NODE_DIRECTORIES:
        for where in (f"{pattern}/*", f"{pattern}/@*/*"):
            for directory in _directories(root, where, _MAX_CANDIDATES):
                yield _node_package(_read_text("package.json", directory, _MAX_RECORD_BYTES * 4))


def _node_package(text: str | None) -> Package | None:
    try:
        record = json.loads(text or "null")
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    return _package(record.get("name"), record.get("version"))


_MANAGERS: Mapping[str, Callable[[int], Candidates]] = {"dpkg": _dpkg, "pip": _pip, "npm": _npm}


# Reading ------------------------------------------------------------------------------------


def _package(name: object, version: object) -> Package | None:
    if not isinstance(name, str) or not isinstance(version, str):
        return None
    cleaned = _printable(name, NAME_CHARACTERS), _printable(version, VERSION_CHARACTERS)
    return cleaned if all(cleaned) else None


def _printable(text: str, limit: int) -> str:
    """Drop control, formatting and undecodable characters, and truncate."""
    return "".join(itertools.islice(filter(str.isprintable, text.strip()), limit))


def _fields(paragraph: str) -> dict[str, str]:
    """Parse header fields up to an empty line: lower-case names, the first value of each."""
    fields: dict[str, str] = {}
    for line in paragraph.lstrip("\n").split("\n"):
        if not line.strip():
            break
        name, colon, value = line.partition(":")
        if colon and not line[0].isspace():
            fields.setdefault(name.lower(), value.strip())
    return fields


def _directories(root: int, pattern: str, limit: int = _MAX_DIRECTORIES) -> Iterator[int]:
    """Yield descriptors of matching directories, each open until the next is requested."""
    yield from itertools.islice(_walk_pattern(root, pattern.split("/")), limit)


def _walk_pattern(parent: int, parts: list[str]) -> Iterator[int]:
    if not parts:
        yield parent
        return
    names = [parts[0]]
    if "*" in parts[0]:
        names = [entry.name for entry in _matching_entries(parent, parts[0]) if is_directory(entry)]
    for name in names[:_MAX_CANDIDATES]:
        with open_if_directory(name, parent) as found:
            if found is not None:
                yield from _walk_pattern(found, parts[1:])


def _matching_entries(directory: int, *patterns: str) -> list[os.DirEntry[str]]:
    found = (
        entry
        for entry in list_entries(directory)
        if any(fnmatchcase(entry.name, pattern) for pattern in patterns)
    )
    return sorted(found, key=lambda entry: os.fsencode(entry.name))


def _read_text(name: str, directory: int, limit: int) -> str | None:
    """Return the beginning of a regular file; None if it is anything else."""
    with _open_regular(name, directory) as descriptor:
        if descriptor is None:
            return None
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(limit).decode("utf-8", "replace")


@contextmanager
def _open_regular(name: str, directory: int) -> Iterator[int | None]:
    # Non-blocking: opening a FIFO would wait for its writer.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        descriptor = os.open(name, flags, dir_fd=directory)
    except OSError:
        yield None
        return
    try:
        yield descriptor if stat.S_ISREG(os.fstat(descriptor).st_mode) else None
    finally:
        os.close(descriptor)
