"""Snapshots: the contents of a running sandbox's disk and tmpfs, to start others from.

A snapshot is a directory, published by one rename and flushed to disk::

    snapshots/<id>/disk.ext4        the sandbox's disk (disk.py), sparse
    snapshots/<id>/tmpfs.tar        the contents of /workspace, /tmp and /dev/shm, if any
    snapshots/<id>/snapshot.json    the sandbox, the image and the time
    snapshots/<id>/kept             exists once it was restored from quarantine
    snapshots/.<id>/                a capture in progress; ``source.json`` names the sandbox

The snapshot uses the image below like a sandbox does (user ``snapshot.<id>``), so that its tree
is retained although the image is deleted or rebuilt.

**What is captured, and how consistent it is.**  The disk is a copy of one instant: during the copy,
every process of the sandbox is frozen, and so is its file system if a process of the host's writes
to it, which is what keeps the output of background commands.  The tmpfs are archived just before,
file by file, while programs run: a program that writes to both may be captured between two writes.
*Memory* is not captured: no processes, no open connections.  (CRIU does not run on these kernels.)
A sandbox started from a snapshot boots anew on the files.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict, TypeAdapter

from hostruntime.build.layers import DISK_FILE, TMPFS_FILE
from hostruntime.container.cgroups import (
    ContainerGroups,
    cgroup_layout,
    freeze_group,
    is_frozen,
    pids_under,
)
from hostruntime.container.disk import Disks
from hostruntime.container.limits import Limits
from hostruntime.container.manager import ContainerManager
from hostruntime.container.saved_disk import finish
from hostruntime.container.tmpfs import TAR_FILES_CHANGED, restore_tmpfs, save_tmpfs
from hostruntime.errors import Conflict, HostFault, HostFull, InvalidRequest, NotFound
from hostruntime.host import kernel
from hostruntime.host.paths import Instance, StatePaths, read_json, write_json
from hostruntime.host.patience import Patience, scaled
from hostruntime.host.records import STRICT, BadRecord, read_record
from hostruntime.host.tasks import Stop, StoppedError, in_thread
from hostruntime.image.quarantine import QuarantinedItem
from hostruntime.image.store import ImageStore
from hostruntime.image.trash import Trash
from hostruntime.wire.sandboxes import SnapshotInfo

ARCHIVE_SECONDS = 300.0
FREEZE_SECONDS = 10.0
_POLL_SECONDS = 0.001
_RECORD, _SOURCE, _RETAINED = "snapshot.json", "source.json", "kept"
# A younger snapshot may belong to a row that did not exist yet when the rows were read.
RECONCILE_AGE_SECONDS = scaled(300.0)
# tar's overhead: a header for each file, and sizes that are rounded up.
_ARCHIVE_OVERHEAD = 1.25
_MIB = 1024 * 1024
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", re.ASCII)


Ids = list[str]
Lock = AbstractAsyncContextManager[None]


@dataclass(frozen=True)
class Source:
    """The sandbox that a snapshot is taken of."""

    sandbox: str
    image_id: str
    limits: Limits


@dataclass(frozen=True)
class Snapshot:
    """A snapshot on disk; ``frozen_ms`` is how long its sandbox was frozen for it."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    id: str
    sandbox: str
    image_id: str
    disk_mb: int
    size_bytes: int
    created_at: float
    frozen_ms: float

    def info(self) -> SnapshotInfo:
        """The snapshot as the agent's API returns it."""
        fields = asdict(self) | {"frozen_ms": round(self.frozen_ms, 2)}
        return SnapshotInfo(image=fields.pop("image_id"), **fields)


@dataclass(frozen=True)
class _Copied:
    """A copy of a disk: how long its sandbox was frozen, and whether nothing wrote meanwhile."""

    frozen_ms: float
    consistent: bool


_SNAPSHOT = TypeAdapter(Snapshot)
Snapshots = list[Snapshot]


@dataclass
class SnapshotManager:
    """The snapshots of one host.  For use on one event loop; call :meth:`recover` first."""

    paths: StatePaths
    containers: ContainerManager
    store: ImageStore
    # The sandboxes that are frozen for a copy at the moment.
    frozen: set[str] = field(default_factory=set)
    _snapshots: dict[str, Snapshot] = field(default_factory=dict)
    _stops: dict[str, tuple[str, Stop]] = field(default_factory=dict)
    _aborted_for_space: set[str] = field(default_factory=set)
    _users: Counter[str] = field(default_factory=Counter)
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    def recover(self) -> None:
        """Load the records; set damaged ones aside.  Raises OSError."""
        for directory in _directories(self.paths):
            try:
                snapshot = read_snapshot(directory)
            except BadRecord as error:
                self.store.quarantine.add_damaged(directory, "snapshot", error.detail)
            else:
                self._snapshots[snapshot.id] = snapshot

    def close(self) -> None:
        """Abort the captures in progress."""
        for _, stop in self._stops.values():
            stop.event.set()

    # Operations ----------------------------------------------------------------------------

    def list(self) -> list[Snapshot]:
        """Every snapshot, oldest first."""
        return sorted(self._snapshots.values(), key=lambda snapshot: snapshot.created_at)

    def get(self, snapshot_id: str) -> Snapshot:
        """One snapshot; raises NotFound."""
        try:
            return self._snapshots[snapshot_id]
        except KeyError:
            raise NotFound(f"There is no snapshot {snapshot_id[:80]!r} on this host.") from None

    async def capture(
        self, snapshot_id: str, source: Source, lock: Lock, require_running: Callable[[], None]
    ) -> tuple[Snapshot, bool]:
        """Take a snapshot of a running sandbox; return it, and whether it is new.

        While the sandbox is frozen, ``lock`` is held, and ``require_running`` is called.  Raises
        InvalidRequest, Conflict (another snapshot of it is being taken), HostFull, ContainerGone,
        StoppedError, HostFault; then nothing is left behind.
        """
        if _ID.fullmatch(snapshot_id) is None:
            raise InvalidRequest(f"{snapshot_id[:80]!r} is not a snapshot id.")
        if snapshot_id in self._snapshots:
            return self._snapshots[snapshot_id], False
        if any(sandbox == source.sandbox for sandbox, _ in self._stops.values()):
            raise Conflict("A snapshot of this sandbox is being taken; try again when it is done.")
        stop = Stop()
        self._stops[snapshot_id] = (source.sandbox, stop)
        try:
            await in_thread(self._require_space, 0)
            async with self._in_use(snapshot_id):
                snapshot = await self._capture(snapshot_id, source, lock, require_running, stop)
        except StoppedError as error:
            if snapshot_id not in self._aborted_for_space:
                raise
            raise HostFull("The host's disk became full during the copy.") from error
        finally:
            del self._stops[snapshot_id]
            self._aborted_for_space.discard(snapshot_id)
        return snapshot, True

    def abort_for_space(self) -> None:
        """Abort the captures in progress for lack of disk space; they raise HostFull."""
        self._aborted_for_space.update(self._stops)
        self.close()

    def interrupt(self, sandbox_id: str) -> None:
        """Abort the capture of a sandbox that is about to end."""
        for sandbox, stop in self._stops.values():
            if sandbox == sandbox_id:
                stop.event.set()

    async def delete(self, snapshot_id: str) -> None:
        """Delete a snapshot, or abort its capture; waits for starts from it; idempotent."""
        if snapshot_id in self._stops:
            self._stops[snapshot_id][1].event.set()
        async with self._changed:
            await self._changed.wait_for(lambda: not self._users[snapshot_id])
            snapshot = self._snapshots.pop(snapshot_id, None)
            if snapshot is not None:
                await in_thread(self._discard, self._directory(snapshot.id), snapshot)

    async def reconcile(self, keep: Collection[str], limit: int) -> tuple[Ids, Ids]:
        """Set aside up to ``limit`` snapshots not in ``keep`` that are old enough and unused.

        Returns the ids of those, and of those left for later.  Raises OSError.
        """
        unnamed = await in_thread(self._unnamed, self.list(), keep)
        set_aside: Ids = []
        waiting: Ids = []
        for snapshot in unnamed:
            # It may have been deleted meanwhile, or be in use.
            if self._snapshots.get(snapshot.id) is not snapshot or self._users[snapshot.id]:
                continue
            if len(set_aside) == limit:
                waiting.append(snapshot.id)
                continue
            del self._snapshots[snapshot.id]
            set_aside.append(snapshot.id)
            detail = "no snapshot of the database has this name"
            add, directory = self.store.quarantine.add, self._directory(snapshot.id)
            try:
                await in_thread(add, directory, "snapshot", "unknown", detail, snapshot.size_bytes)
            except OSError:
                self._snapshots[snapshot.id] = snapshot
                raise
        return set_aside, waiting

    def _unnamed(self, snapshots: Sequence[Snapshot], keep: Collection[str]) -> Snapshots:
        """The snapshots that are not in ``keep`` and old enough to set aside."""
        cutoff, unnamed = time.time() - RECONCILE_AGE_SECONDS, []
        for snapshot in snapshots:
            marker = self._directory(snapshot.id) / _RETAINED
            if snapshot.id in keep:
                marker.unlink(missing_ok=True)
            elif snapshot.created_at < cutoff and not marker.exists():
                unnamed.append(snapshot)
        return unnamed

    def restore_quarantined(self, item: QuarantinedItem) -> Snapshot:
        """Restore a quarantined snapshot; it is then retained even if no row names it.

        Raises Conflict (its name is taken, or its record is still damaged), OSError.
        """
        content, target = self.store.quarantine.content_path(item), self._directory(item.name)
        if os.path.lexists(target):
            raise Conflict(f"There is a snapshot {item.name} already.")
        try:
            snapshot = read_snapshot(content, item.name)
        except BadRecord as error:
            raise Conflict(f"The snapshot is still damaged. {error.detail}") from error
        (content / _RETAINED).touch(mode=0o600)
        content.rename(target)
        kernel.fsync(self.paths.snapshots)
        self._snapshots[snapshot.id] = snapshot
        self.store.quarantine.remove_entry(item)
        return snapshot

    # Starting from a snapshot --------------------------------------------------------------

    @asynccontextmanager
    async def use(self, snapshot_id: str) -> AsyncIterator[Snapshot]:
        """Keep a snapshot from being deleted in this block.  Raises NotFound, HostFull."""
        snapshot = self.get(snapshot_id)
        async with self._in_use(snapshot_id):
            await in_thread(self._require_space, snapshot.size_bytes)
            yield snapshot

    def disk(self, snapshot: Snapshot) -> Path:
        """The file of its disk, to start a container with."""
        return self._directory(snapshot.id) / DISK_FILE

    async def restore(self, snapshot: Snapshot, owner: str) -> None:
        """Restore the tmpfs of a container started on its disk.  Raises HostError, OSError."""
        archive = self._directory(snapshot.id) / TMPFS_FILE
        if await in_thread(archive.exists):
            await restore_tmpfs(self.containers, owner, archive, timeout=ARCHIVE_SECONDS)

    # Taking a snapshot ---------------------------------------------------------------------

    async def _capture(
        self,
        snapshot_id: str,
        source: Source,
        lock: Lock,
        require_running: Callable[[], None],
        stop: Stop,
    ) -> Snapshot:
        directory = self.paths.snapshots / f".{snapshot_id}"
        try:
            with _disk_errors():
                await in_thread(self._prepare, directory, snapshot_id, source)
                require_running()
                await in_thread(self._require_space_for_copy, source)
                await self._archive(directory / TMPFS_FILE, source)
                await asyncio.to_thread(self.containers.flush_disk, source.sandbox)
                async with lock:
                    require_running()
                    copied = await self._copy(directory / DISK_FILE, source.sandbox, stop)
                return await in_thread(self._publish, directory, snapshot_id, source, copied, stop)
        except BaseException:
            await in_thread(self.store.trash.discard, directory)
            await in_thread(self.store.release, source.image_id, image_user(snapshot_id))
            raise

    def _prepare(self, directory: Path, snapshot_id: str, source: Source) -> None:
        self.store.trash.discard(directory)
        directory.mkdir(mode=0o700)
        container = self.containers.name_of(source.sandbox)
        write_json(directory / _SOURCE, {"sandbox": source.sandbox, "container": container})
        self.store.share(source.image_id, source.sandbox, image_user(snapshot_id))

    def _require_space_for_copy(self, source: Source) -> None:
        self._require_space(self.containers.disk_allocated(source.sandbox))

    async def _archive(self, target: Path, source: Source) -> None:
        limits = source.limits
        max_bytes = (limits.workspace_size_mb + limits.tmp_size_mb) * _MIB * _ARCHIVE_OVERHEAD
        status = await save_tmpfs(
            self.containers,
            source.sandbox,
            target,
            max_bytes=int(max_bytes),
            timeout=ARCHIVE_SECONDS,
        )
        if status not in {0, TAR_FILES_CHANGED}:
            raise HostFault(
                "What is in /workspace and /tmp could not be archived: `tar` in the sandbox "
                f"{'took too long' if status is None else f'exited with status {status}'}."
            )

    async def _copy(self, target: Path, sandbox: str, stop: Stop) -> _Copied:
        """Copy the disk of a sandbox, frozen meanwhile."""
        name = self.containers.name_of(sandbox)
        self.frozen.add(sandbox)
        try:
            async with self.containers.launchers.gate.closed(name):
                return await stop.in_thread(self._copy_frozen, target, sandbox, stop)
        finally:
            self.frozen.discard(sandbox)

    def _copy_frozen(self, target: Path, sandbox: str, stop: Stop) -> _Copied:
        start = time.monotonic()
        groups, disks = self._groups(sandbox), self.containers.disks
        with frozen(groups.unified):
            # Who keeps what background commands print is not frozen. None can be started now.
            save = disks.save_frozen if groups.has_supervisors() else disks.save_unwritten
            consistent = save(sandbox, target, stop.check)
        return _Copied((time.monotonic() - start) * 1000, consistent)

    def _publish(
        self, directory: Path, snapshot_id: str, source: Source, copied: _Copied, stop: Stop
    ) -> Snapshot:
        finish(directory / DISK_FILE, consistent=copied.consistent)
        stop.check()
        (directory / _SOURCE).unlink()
        size = sum(path.stat().st_blocks * 512 for path in directory.iterdir())
        snapshot = Snapshot(
            id=snapshot_id,
            sandbox=source.sandbox,
            image_id=source.image_id,
            disk_mb=source.limits.disk_size_mb,
            size_bytes=size,
            created_at=time.time(),
            frozen_ms=copied.frozen_ms,
        )
        write_json(directory / _RECORD, asdict(snapshot))
        _fsync_together([*directory.iterdir(), directory])
        directory.rename(self._directory(snapshot_id))
        kernel.fsync(self.paths.snapshots)
        self._snapshots[snapshot_id] = snapshot
        return snapshot

    # Pieces --------------------------------------------------------------------------------

    @asynccontextmanager
    async def _in_use(self, snapshot_id: str) -> AsyncIterator[None]:
        self._users[snapshot_id] += 1
        try:
            yield
        finally:
            self._users[snapshot_id] -= 1
            if not self._users[snapshot_id]:
                del self._users[snapshot_id]
            async with self._changed:
                self._changed.notify_all()

    def _discard(self, directory: Path, snapshot: Snapshot) -> None:
        self.store.trash.discard(directory)
        self.store.release(snapshot.image_id, image_user(snapshot.id))

    def _require_space(self, size_bytes: int) -> None:
        try:
            self.containers.disks.require_space(size_bytes)
        except HostFull as error:
            raise HostFull(
                "The host's disk has no space for another copy of this sandbox's disk."
            ) from error

    def _groups(self, sandbox_id: str) -> ContainerGroups:
        return cgroup_layout().container(self.containers.name_of(sandbox_id))

    def _directory(self, snapshot_id: str) -> Path:
        return self.paths.snapshots / snapshot_id


def image_user(snapshot_id: str) -> str:
    """The name under which a snapshot uses its image."""
    return f"snapshot.{snapshot_id}"


def image_users(paths: StatePaths) -> frozenset[str]:
    """All snapshots, including quarantined ones, as users of images."""
    quarantined = (
        path.name.removeprefix("snapshot.") for path in paths.quarantine.glob("snapshot.*")
    )
    names = [directory.name for directory in _directories(paths)]
    return frozenset(image_user(name.partition("~")[0]) for name in (*names, *quarantined))


def remove_incomplete(paths: StatePaths, instance: Instance, trash: Trash) -> None:
    """Discard a killed agent's unfinished captures, and thaw the sandboxes frozen for them."""
    for directory in paths.snapshots.glob(".*"):
        source = read_json(directory / _SOURCE) or {}
        if sandbox := source.get("sandbox"):
            Disks(paths, instance).thaw(str(sandbox))
            # Agents of earlier versions did not record the container's name.
            name = str(source.get("container") or instance.container_name(str(sandbox)))
            freeze_group(cgroup_layout().container(name).unified, frozen=False)
        trash.discard(directory)


@contextmanager
def frozen(group: Path) -> Iterator[None]:
    """Freeze a control group for the duration of the block.  Blocks; raises HostFault."""
    freeze_group(group, frozen=True)
    try:
        patience = Patience(FREEZE_SECONDS, lambda: pids_under(group))
        while not is_frozen(group):
            if patience.exhausted():
                raise HostFault("A process of the sandbox is blocked in the kernel; try again.")
            time.sleep(_POLL_SECONDS)
        yield
    finally:
        freeze_group(group, frozen=False)


def _fsync_together(paths: Sequence[Path]) -> None:
    """Flush files at the same time: the file system then commits once for all of them.

    Raises OSError.
    """
    with ThreadPoolExecutor(len(paths)) as threads:
        for _ in threads.map(kernel.fsync, paths):
            pass


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise HostFull("The host's disk became full during the copy.") from error
        raise HostFault(f"The snapshot could not be written: {error.strerror}.") from error


def _directories(paths: StatePaths) -> list[Path]:
    return sorted(paths.snapshots.glob("[!.]*"))


def read_snapshot(directory: Path, name: str | None = None) -> Snapshot:
    """Read the snapshot in a directory, named ``name`` or like it.  Raises BadRecord."""
    path = directory / _RECORD
    snapshot = read_record(path, _SNAPSHOT)
    if snapshot is None:
        raise BadRecord(path, "it is missing")
    if snapshot.id != (name or directory.name):
        raise BadRecord(path, f"it is the record of {snapshot.id[:100]!r}")
    if not (directory / DISK_FILE).is_file():
        raise BadRecord(path, "its disk is missing")
    return snapshot
