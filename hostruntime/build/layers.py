"""Layers: the result of a build's first steps, cached for builds that start with the same steps.

A layer is a directory::

    layers/<scope>/<key>/disk.ext4     the build's disk (disk.py) after a step, sparse
    layers/<scope>/<key>/tmpfs.tar     the content of the container's tmpfs, unless empty
    layers/<scope>/<key>/layer.json    which steps, when and by which build they were run
    layers/.<name>/                    a layer being written

Its key is the SHA-256 of the canonical JSON of everything that a step's result depends on,
including the key of the previous step (:func:`layer_keys`). A layer belongs to its scope (a team)
and is never used in another.

Layers are a cache. They are not flushed to disk, so they are valid only until the machine reboots;
if one is damaged or missing, the steps are run. Layers are kept for a week after their last use,
the most recently used first, within the budget; none while the disk is short of space.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from hostruntime.build.report import RefusedHost
from hostruntime.errors import InvalidRequest
from hostruntime.host.disk_space import DiskSpace
from hostruntime.host.paths import StatePaths, read_json, write_json
from hostruntime.image.store import check_name
from hostruntime.image.trash import Trash

KEEP_SECONDS = 7 * 86_400.0
DEFAULT_BUDGET_BYTES = 20 * 1024**3
DEFAULT_SHARE = 0.10
# In units of the disk reserve: with less free space, no layers are kept.
MIN_FREE_SHARES = 2.0
DISK_FILE, TMPFS_FILE = "disk.ext4", "tmpfs.tar"
_RECORD = "layer.json"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_BLOCK = 512


@dataclass(frozen=True)
class CompletedStep:
    """A step that was run: by which build, when it finished (Unix seconds), what it was refused.

    A step that succeeded without a host it was refused may be incomplete, so this is reported again
    when it is reused. So are files it left in directories that are not captured (``uncaptured``),
    and files it changed that the host replaces (``lost_writes``), both as absolute paths inside.
    """

    build: str
    at: float
    refused: tuple[RefusedHost, ...] = ()
    uncaptured: tuple[str, ...] = ()
    lost_writes: tuple[str, ...] = ()

    def to_wire(self) -> dict[str, Any]:
        """Return the form stored in a layer's record."""
        refused = [item.to_wire() for item in self.refused]
        paths = {"left": list(self.uncaptured), "unkept": list(self.lost_writes)}
        return {"build": self.build, "at": self.at, "refused": refused, **paths}

    @classmethod
    def from_wire(cls, record: Mapping[str, Any]) -> Self:
        """Parse the output of :meth:`to_wire`; raises KeyError, TypeError for anything else."""
        refused = tuple(RefusedHost.from_wire(item) for item in record.get("refused", ()))
        uncaptured, lost_writes = (
            tuple(map(str, record.get(name, ()))) for name in ("left", "unkept")
        )
        return cls(str(record["build"]), record["at"], refused, uncaptured, lost_writes)


@dataclass(frozen=True)
class Layer:
    """A layer on disk; it may be deleted or replaced at any time.

    ``steps`` are those whose result it holds, starting with the first; ``tmpfs`` is the archive of
    the tmpfs, None if that was empty. ``inode`` distinguishes the layer from a replacement.
    """

    directory: Path
    steps: tuple[CompletedStep, ...]
    tmpfs: Path | None
    inode: int

    @property
    def disk(self) -> Path:
        """The path of the saved disk."""
        return self.directory / DISK_FILE

    def still_exists(self) -> bool:
        """Whether the layer has not been deleted or replaced."""
        try:
            return self.directory.stat().st_ino == self.inode
        except FileNotFoundError:
            return False


def layer_keys(
    base: Mapping[str, Any],
    commands: Sequence[Sequence[str]],
    environment: Mapping[str, str],
    network: Mapping[str, Any],
    disk_mb: int,
) -> list[str]:
    """Return the key after each of ``commands`` (argvs), run in sequence over ``base``."""
    keys: list[str] = []
    parent = _canonical_digest(base)
    for argv in commands:
        parent = _canonical_digest(
            {
                "parent": parent,
                "argv": list(argv),
                "environment": dict(environment),
                "network": dict(network),
                "disk_mb": disk_mb,
            }
        )
        keys.append(parent)
    return keys


def _canonical_digest(record: Mapping[str, Any]) -> str:
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def budget_bytes(paths: StatePaths, environment: Mapping[str, str] = os.environ) -> int:
    """Return the space for layers: ``ORKESTR_LAYERS_GIB``, or 20 GiB, at most 10 % of the disk.

    0 disables layers.  Raises InvalidRequest for an invalid value.
    """
    setting = environment.get("ORKESTR_LAYERS_GIB", "").strip()
    if not setting:
        found = os.statvfs(paths.root)
        return min(DEFAULT_BUDGET_BYTES, int(found.f_blocks * found.f_frsize * DEFAULT_SHARE))
    try:
        size = float(setting)
        if not 0 <= size < 1e9:
            raise ValueError
    except ValueError:
        raise InvalidRequest(
            f"ORKESTR_LAYERS_GIB takes a number of GiB, 0 for none, not {setting[:50]!r}."
        ) from None
    return int(size * 1024**3)


class LayerStore:
    """The layers of one installation.  Methods may be called from any thread."""

    def __init__(self, paths: StatePaths, trash: Trash, budget: int) -> None:
        self._root = paths.layers
        self._trash = trash
        self._budget = budget
        self._lock = threading.Lock()
        self._boot = _BOOT_ID.read_text().strip()
        self._counter = itertools.count()

    def deepest(self, scope: str, keys: Sequence[str]) -> Layer | None:
        """Return the layer of the last of ``keys`` (one per step) that has a valid one.

        Marks it as used.
        """
        for count in range(len(keys), 0, -1):
            layer = self._read(self._root / check_name(scope) / keys[count - 1])
            if layer is not None and len(layer.steps) == count:
                with contextlib.suppress(FileNotFoundError):
                    os.utime(layer.directory / _RECORD)
                    return layer
        return None

    def has_room(self, size_bytes: int) -> bool:
        """Whether a layer of that size fits the budget and leaves enough free disk space."""
        free = DiskSpace.of(self._root).after_writing(size_bytes)
        return (
            size_bytes <= self._budget and not free.read_only and free.free_ratio > MIN_FREE_SHARES
        )

    def create_staging(self, build: str) -> Path:
        """Create an empty directory for a layer, to pass to :meth:`add` or :meth:`discard`."""
        directory = self._root / f".{check_name(build)}-{next(self._counter)}"
        directory.mkdir(mode=0o700)
        return directory

    def add(self, directory: Path, scope: str, key: str, steps: Sequence[CompletedStep]) -> None:
        """Turn ``directory`` into a layer, replacing any with that key.

        Raises OSError.
        """
        sizes = {path.name: path.stat().st_size for path in directory.iterdir()}
        record = {"boot": self._boot, "sizes": sizes, "steps": [step.to_wire() for step in steps]}
        write_json(directory / _RECORD, record)
        target = self._root / check_name(scope) / key
        with self._lock:
            target.parent.mkdir(mode=0o700, exist_ok=True)
            self._trash.discard(target)
            directory.rename(target)
        self.collect()

    def discard(self, path: Path) -> None:
        """Delete a layer, or a directory of :meth:`create_staging`; idempotent."""
        self._trash.discard(path)

    def delete_written_by(self, build: str, scope: str, keys: Sequence[str]) -> None:
        """Delete the layers of ``keys`` that ``build`` wrote."""
        for key in keys:
            layer = self._read(self._root / check_name(scope) / key)
            if layer is not None and layer.steps[-1].build == build:
                self.discard(layer.directory)

    def recover(self) -> None:
        """Delete unfinished layers and those of an earlier boot; called at start."""
        for directory in self._root.glob(".*"):
            self.discard(directory)
        for directory in self._root.glob("*/*"):
            if self._read(directory) is None:
                self.discard(directory)
        self.collect()

    def collect(self) -> None:
        """Delete layers unused for a week or over the budget; all if the disk is short."""
        with self._lock:
            now, total = time.time(), 0
            budget = self._budget if self.has_room(0) else 0
            for used_at, directory in sorted(self._by_last_use(), reverse=True):
                total += _size(directory)
                if total > budget or used_at < now - KEEP_SECONDS:
                    self.discard(directory)
            for scope in self._root.glob("[!.]*"):
                with contextlib.suppress(OSError):
                    scope.rmdir()

    def _by_last_use(self) -> list[tuple[float, Path]]:
        found = []
        for directory in self._root.glob("[!.]*/*"):
            used_at = 0.0
            with contextlib.suppress(OSError):
                used_at = (directory / _RECORD).stat().st_mtime
            found.append((used_at, directory))
        return found

    def _read(self, directory: Path) -> Layer | None:
        """Read the layer in a directory, if it is complete judging by its record and sizes."""
        try:
            inode = directory.stat().st_ino
            record = read_json(directory / _RECORD)
            if record is None or record["boot"] != self._boot:
                return None
            names = {DISK_FILE, *record["sizes"]}
            sizes = {name: (directory / name).stat().st_size for name in names}
            steps = tuple(CompletedStep.from_wire(step) for step in record["steps"])
        except (OSError, KeyError, TypeError, ValueError, AttributeError):
            return None
        if sizes != record["sizes"] or not steps:
            return None
        tmpfs = directory / TMPFS_FILE if TMPFS_FILE in names else None
        return Layer(directory, steps, tmpfs, inode)


def _size(directory: Path) -> int:
    try:
        return sum(path.stat().st_blocks * _BLOCK for path in directory.iterdir())
    except OSError:
        return 0
