"""Layers: what the first steps of a build had made, kept for a build that begins the same.

A layer is a directory::

    layers/<scope>/<key>/disk.ext4     the build's disk (disk.py) after a step, sparse
    layers/<scope>/<key>/tmpfs.tar     what was in the container's tmpfs, if anything was
    layers/<scope>/<key>/layer.json    which steps, when and by which build they were run
    layers/.<name>/                    one being written

Its key is the SHA-256 of the canonical JSON of all that what a step makes depends on, the key of
the step before it included (:func:`layer_keys`).  A layer belongs to its scope (a team) and is
never looked for in another.

Layers are a cache.  They are not flushed to disk, so they are believed only until the machine
boots anew; one that is damaged, or gone, means that the steps are run.  Kept are those used within
a week, the most recently used first, as far as the budget goes; none while the disk is short.
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

from hostruntime.build.report import Refused
from hostruntime.errors import InvalidRequest
from hostruntime.host.disk_space import DiskSpace
from hostruntime.host.paths import StatePaths, read_json, write_json
from hostruntime.image.store import check_name
from hostruntime.image.trash import Trash

KEEP_SECONDS = 7 * 86_400.0
DEFAULT_BUDGET_BYTES = 20 * 1024**3
DEFAULT_SHARE = 0.10
# Times what is reserved of the disk: with less left there are no layers.
SHARES_LEFT = 2.0
DISK, TMPFS = "disk.ext4", "tmpfs.tar"
_RECORD = "layer.json"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_BLOCK = 512


@dataclass(frozen=True)
class RanStep:
    """A step that was run: by which build, when it had ended (Unix seconds), what it was refused.

    A step that did without a host it was refused is as it is for want of that host, also where it
    is not run again.  The same goes for what it did in vain: what it had ``left`` where nothing is
    captured, and what it wrote that is not kept (``unkept``), both as absolute paths inside.
    """

    build: str
    at: float
    refused: tuple[Refused, ...] = ()
    left: tuple[str, ...] = ()
    unkept: tuple[str, ...] = ()

    def to_wire(self) -> dict[str, Any]:
        """As a layer's record has it."""
        refused = [one.to_wire() for one in self.refused]
        vain = {"left": list(self.left), "unkept": list(self.unkept)}
        return {"build": self.build, "at": self.at, "refused": refused, **vain}

    @classmethod
    def from_wire(cls, record: Mapping[str, Any]) -> Self:
        """Read what :meth:`to_wire` wrote; raises KeyError, TypeError for anything else."""
        refused = tuple(Refused.from_wire(one) for one in record.get("refused", ()))
        left, unkept = (tuple(map(str, record.get(name, ()))) for name in ("left", "unkept"))
        return cls(str(record["build"]), record["at"], refused, left, unkept)


@dataclass(frozen=True)
class Layer:
    """A layer on disk, as it was found; it may be deleted or replaced at any time.

    ``steps`` are those it holds the result of, from the first on; ``tmpfs`` is the archive of what
    was in the tmpfs, None when they were empty.  ``inode`` tells it from what replaces it.
    """

    directory: Path
    steps: tuple[RanStep, ...]
    tmpfs: Path | None
    inode: int

    @property
    def disk(self) -> Path:
        """The saved disk."""
        return self.directory / DISK

    def is_there(self) -> bool:
        """Whether it still is what it was found to be."""
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
    """The key after each of ``commands`` (argvs), run one after the other over ``base``."""
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
    """How much layers may take: ``ORKESTR_LAYERS_GIB``, or 20 GiB, at most 10 % of the disk.

    0 means none.  Raises InvalidRequest for what is no such number.
    """
    named = environment.get("ORKESTR_LAYERS_GIB", "").strip()
    if not named:
        found = os.statvfs(paths.root)
        return min(DEFAULT_BUDGET_BYTES, int(found.f_blocks * found.f_frsize * DEFAULT_SHARE))
    try:
        size = float(named)
        if not 0 <= size < 1e9:
            raise ValueError
    except ValueError:
        raise InvalidRequest(
            f"ORKESTR_LAYERS_GIB takes a number of GiB, 0 for none, not {named[:50]!r}."
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
        """The last of ``keys`` (one a step) that there is a sound layer for; now last used."""
        for count in range(len(keys), 0, -1):
            layer = self._read(self._root / check_name(scope) / keys[count - 1])
            if layer is not None and len(layer.steps) == count:
                with contextlib.suppress(FileNotFoundError):
                    os.utime(layer.directory / _RECORD)
                    return layer
        return None

    def has_room(self, size_bytes: int) -> bool:
        """Whether a layer of that size may be written: never on the last gigabytes of the disk."""
        left = DiskSpace.of(self._root).after_writing(size_bytes)
        return size_bytes <= self._budget and not left.read_only and left.free_ratio > SHARES_LEFT

    def begin(self, build: str) -> Path:
        """An empty directory to write a layer in, to be given to :meth:`add` or :meth:`discard`."""
        directory = self._root / f".{check_name(build)}-{next(self._counter)}"
        directory.mkdir(mode=0o700)
        return directory

    def add(self, directory: Path, scope: str, key: str, steps: Sequence[RanStep]) -> None:
        """Make a layer of what is in ``directory``, in place of any of that key.

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
        """Delete a layer, or a directory of :meth:`begin`; a missing one is fine."""
        self._trash.discard(path)

    def forget(self, build: str, scope: str, keys: Sequence[str]) -> None:
        """Delete those of ``keys`` whose layer that build wrote."""
        for key in keys:
            layer = self._read(self._root / check_name(scope) / key)
            if layer is not None and layer.steps[-1].build == build:
                self.discard(layer.directory)

    def recover(self) -> None:
        """The pass at start: drop what was being written, and what an earlier boot left."""
        for directory in self._root.glob(".*"):
            self.discard(directory)
        for directory in self._root.glob("*/*"):
            if self._read(directory) is None:
                self.discard(directory)
        self.collect()

    def collect(self) -> None:
        """Delete what was not used for a week or is over the budget; all if the disk is short."""
        with self._lock:
            now, kept = time.time(), 0
            budget = self._budget if self.has_room(0) else 0
            for used_at, directory in sorted(self._by_use(), reverse=True):
                kept += _size(directory)
                if kept > budget or used_at < now - KEEP_SECONDS:
                    self.discard(directory)
            for scope in self._root.glob("[!.]*"):
                with contextlib.suppress(OSError):
                    scope.rmdir()

    def _by_use(self) -> list[tuple[float, Path]]:
        found = []
        for directory in self._root.glob("[!.]*/*"):
            used_at = 0.0
            with contextlib.suppress(OSError):
                used_at = (directory / _RECORD).stat().st_mtime
            found.append((used_at, directory))
        return found

    def _read(self, directory: Path) -> Layer | None:
        """The layer in a directory, if it is whole as far as can be told without reading it."""
        try:
            inode = directory.stat().st_ino
            record = read_json(directory / _RECORD)
            if record is None or record["boot"] != self._boot:
                return None
            names = {DISK, *record["sizes"]}
            sizes = {name: (directory / name).stat().st_size for name in names}
            steps = tuple(RanStep.from_wire(step) for step in record["steps"])
        except (OSError, KeyError, TypeError, ValueError, AttributeError):
            return None
        if sizes != record["sizes"] or not steps:
            return None
        tmpfs = directory / TMPFS if TMPFS in names else None
        return Layer(directory, steps, tmpfs, inode)


def _size(directory: Path) -> int:
    try:
        return sum(path.stat().st_blocks * _BLOCK for path in directory.iterdir())
    except OSError:
        return 0
