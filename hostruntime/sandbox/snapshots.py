"""Snapshots: what is on a running sandbox's disk and in its tmpfs, to start others from.

A snapshot is a directory, published by one rename and flushed to disk::

    snapshots/<id>/disk.ext4        the sandbox's disk (disk.py), sparse
    snapshots/<id>/tmpfs.tar        what was in /workspace, /tmp and /dev/shm, if anything was
    snapshots/<id>/snapshot.json    of which sandbox, over which image, when
    snapshots/<id>/kept             there once it was put back from quarantine
    snapshots/.<id>/                one being made; ``source.json`` names the sandbox

The image below is used by the snapshot as by a sandbox (user ``snapshot.<id>``), so that its tree
stays although the image is deleted or made anew.

**What is captured, and how it holds together.**  The disk is a copy of one instant: for as long as
the copy takes, every process of the sandbox is frozen and so is the file system.  The tmpfs are
archived just before, while programs run, file by file: a program that writes to both at once may
be seen between two writes.  What is in *memory* is not captured: no process, no open connection.
(CRIU does not run on these kernels.)  A sandbox started from a snapshot boots anew on the files.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict, TypeAdapter

from hostruntime.build.layers import DISK_FILE, TMPFS_FILE
from hostruntime.container.cgroups import Limits, cgroup_layout, freeze_group, is_frozen, pids_below
from hostruntime.container.disk import Disks, mend
from hostruntime.container.manager import ContainerManager
from hostruntime.container.tmpfs import CHANGED, restore_tmpfs, save_tmpfs
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
_RECORD, _SOURCE, _KEPT = "snapshot.json", "source.json", "kept"
# One this young may belong to a row that was not there yet when rows were read.
RECONCILE_AGE_SECONDS = scaled(300.0)
# What tar adds to the content: a header for each file, and sums that are rounded up.
_ARCHIVE_SHARE = 1.25
_MIB = 1024 * 1024
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", re.ASCII)


Ids = list[str]
Turn = AbstractAsyncContextManager[None]


@dataclass(frozen=True)
class Source:
    """The sandbox that a snapshot is taken of."""

    sandbox: str
    image_id: str
    limits: Limits


@dataclass(frozen=True)
class Snapshot:
    """A snapshot on disk; ``frozen_ms`` is how long its sandbox stood still for it."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    id: str
    sandbox: str
    image_id: str
    disk_mb: int
    size_bytes: int
    created_at: float
    frozen_ms: float

    def info(self) -> SnapshotInfo:
        """The answer of the agent's API."""
        known = asdict(self) | {"frozen_ms": round(self.frozen_ms, 2)}
        return SnapshotInfo(image=known.pop("image_id"), **known)


_SNAPSHOT = TypeAdapter(Snapshot)
Snapshots = list[Snapshot]


@dataclass
class SnapshotManager:
    """The snapshots of one host.  For one event loop; :meth:`recover` comes first."""

    paths: StatePaths
    containers: ContainerManager
    store: ImageStore
    # The sandboxes that are frozen for a copy now.
    frozen: set[str] = field(default_factory=set)
    _snapshots: dict[str, Snapshot] = field(default_factory=dict)
    _stops: dict[str, tuple[str, Stop]] = field(default_factory=dict)
    _short: set[str] = field(default_factory=set)
    _users: Counter[str] = field(default_factory=Counter)
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    def recover(self) -> None:
        """Load the records; set aside what cannot be believed.  Raises OSError."""
        for directory in _directories(self.paths):
            try:
                one = read_snapshot(directory)
            except BadRecord as error:
                self.store.quarantine.add_damaged(directory, "snapshot", error.detail)
            else:
                self._snapshots[one.id] = one

    def close(self) -> None:
        """End the captures under way."""
        for _, stop in self._stops.values():
            stop.event.set()

    # What is asked of it -------------------------------------------------------------------

    def list(self) -> list[Snapshot]:
        """Every snapshot, oldest first."""
        return sorted(self._snapshots.values(), key=lambda one: one.created_at)

    def get(self, snapshot_id: str) -> Snapshot:
        """One snapshot; raises NotFound."""
        try:
            return self._snapshots[snapshot_id]
        except KeyError:
            raise NotFound(f"There is no snapshot {snapshot_id[:80]!r} on this host.") from None

    async def capture(
        self, snapshot_id: str, source: Source, turn: Turn, still_runs: Callable[[], None]
    ) -> tuple[Snapshot, bool]:
        """Take a snapshot of a running sandbox; return it, and whether it is new.

        ``turn`` is held, and ``still_runs`` asked, while the sandbox is frozen.  Raises
        InvalidRequest, Conflict (of this sandbox one is being taken), HostFull, ContainerGone,
        StoppedError, HostFault; then nothing is left of it.
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
            await in_thread(self._require_room, 0)
            async with self._used(snapshot_id):
                made = await self._capture(snapshot_id, source, turn, still_runs, stop)
        except StoppedError as error:
            if snapshot_id not in self._short:
                raise
            raise HostFull("The host's disk became full while the copy was made.") from error
        finally:
            del self._stops[snapshot_id]
            self._short.discard(snapshot_id)
        return made, True

    def make_room(self) -> None:
        """The disk is short: end the captures under way, which then raise HostFull."""
        self._short.update(self._stops)
        self.close()

    def interrupt(self, sandbox_id: str) -> None:
        """The sandbox is to end: do not keep it waiting for a snapshot."""
        for sandbox, stop in self._stops.values():
            if sandbox == sandbox_id:
                stop.event.set()

    async def delete(self, snapshot_id: str) -> None:
        """Delete a snapshot, or end its capture; waits for who starts from it; idempotent."""
        if snapshot_id in self._stops:
            self._stops[snapshot_id][1].event.set()
        async with self._changed:
            await self._changed.wait_for(lambda: not self._users[snapshot_id])
            snapshot = self._snapshots.pop(snapshot_id, None)
            if snapshot is not None:
                await in_thread(self._discard, self._directory(snapshot.id), snapshot)

    async def reconcile(self, keep: Collection[str], most: int) -> tuple[Ids, Ids]:
        """Set aside ``most`` snapshots that are not in ``keep``, are old enough and not in use.

        Returns those, and those that wait.  Raises OSError.
        """
        unnamed = await in_thread(self._unnamed, self.list(), keep)
        set_aside: Ids = []
        waiting: Ids = []
        for one in unnamed:
            # It may have been deleted meanwhile, or be in use.
            if self._snapshots.get(one.id) is not one or self._users[one.id]:
                continue
            if len(set_aside) == most:
                waiting.append(one.id)
                continue
            del self._snapshots[one.id]
            set_aside.append(one.id)
            detail = "no snapshot of the database has this name"
            add, directory = self.store.quarantine.add, self._directory(one.id)
            try:
                await in_thread(add, directory, "snapshot", "unknown", detail, one.size_bytes)
            except OSError:
                self._snapshots[one.id] = one
                raise
        return set_aside, waiting

    def _unnamed(self, there: Sequence[Snapshot], keep: Collection[str]) -> Snapshots:
        """Which of these nobody names, and are old enough for that to mean something."""
        youngest, found = time.time() - RECONCILE_AGE_SECONDS, []
        for one in there:
            mark = self._directory(one.id) / _KEPT
            if one.id in keep:
                mark.unlink(missing_ok=True)
            elif one.created_at < youngest and not mark.exists():
                found.append(one)
        return found

    def restore_held(self, held: QuarantinedItem) -> Snapshot:
        """Put back a snapshot that was set aside: it stays, whether or not a row names it.

        Raises Conflict (there is another one, or its record is still bad), OSError.
        """
        content, target = self.store.quarantine.content_path(held), self._directory(held.name)
        if os.path.lexists(target):
            raise Conflict(f"There is a snapshot {held.name} already.")
        try:
            one = read_snapshot(content, held.name)
        except BadRecord as error:
            raise Conflict(f"The snapshot is still damaged. {error.detail}") from error
        (content / _KEPT).touch(mode=0o600)
        content.rename(target)
        kernel.fsync(self.paths.snapshots)
        self._snapshots[one.id] = one
        self.store.quarantine.remove_entry(held)
        return one

    # Starting from one ---------------------------------------------------------------------

    @asynccontextmanager
    async def opened(self, snapshot_id: str) -> AsyncIterator[Snapshot]:
        """A snapshot that stays for as long as this lasts.  Raises NotFound, HostFull."""
        snapshot = self.get(snapshot_id)
        async with self._used(snapshot_id):
            await in_thread(self._require_room, snapshot.size_bytes)
            yield snapshot

    def disk(self, snapshot: Snapshot) -> Path:
        """Its disk, to begin a container with."""
        return self._directory(snapshot.id) / DISK_FILE

    async def restore(self, snapshot: Snapshot, owner: str) -> None:
        """Fill the tmpfs of a container that was started on its disk.  Raises HostError, OSError"""
        archive = self._directory(snapshot.id) / TMPFS_FILE
        if await in_thread(archive.exists):
            await restore_tmpfs(self.containers, owner, archive, timeout=ARCHIVE_SECONDS)

    # Taking one ----------------------------------------------------------------------------

    async def _capture(
        self,
        snapshot_id: str,
        source: Source,
        turn: Turn,
        still_runs: Callable[[], None],
        stop: Stop,
    ) -> Snapshot:
        directory = self.paths.snapshots / f".{snapshot_id}"
        try:
            with _disk_errors():
                await in_thread(self._begin, directory, snapshot_id, source)
                still_runs()
                await in_thread(self._require_room_for, source)
                await self._archive(directory / TMPFS_FILE, source)
                await asyncio.to_thread(self.containers.flush_disk, source.sandbox)
                async with turn:
                    still_runs()
                    frozen_ms = await self._copy(directory / DISK_FILE, source.sandbox, stop)
                await in_thread(mend, directory / DISK_FILE)
                stop.check()
                return await in_thread(self._publish, directory, snapshot_id, source, frozen_ms)
        except BaseException:
            await in_thread(self.store.trash.discard, directory)
            await in_thread(self.store.release, source.image_id, user_of(snapshot_id))
            raise

    def _begin(self, directory: Path, snapshot_id: str, source: Source) -> None:
        self.store.trash.discard(directory)
        directory.mkdir(mode=0o700)
        write_json(directory / _SOURCE, {"sandbox": source.sandbox})
        self.store.share(source.image_id, source.sandbox, user_of(snapshot_id))

    def _require_room_for(self, source: Source) -> None:
        self._require_room(self.containers.disk_allocated(source.sandbox))

    async def _archive(self, target: Path, source: Source) -> None:
        limits = source.limits
        most = (limits.workspace_size_mb + limits.tmp_size_mb) * _MIB * _ARCHIVE_SHARE
        status = await save_tmpfs(
            self.containers, source.sandbox, target, max_bytes=int(most), timeout=ARCHIVE_SECONDS
        )
        if status not in {0, CHANGED}:
            raise HostFault(
                "What is in /workspace and /tmp could not be archived: `tar` in the sandbox "
                f"{'took too long' if status is None else f'ended with status {status}'}."
            )

    async def _copy(self, target: Path, sandbox: str, stop: Stop) -> float:
        """Copy the disk of a sandbox that stands still meanwhile; for how many milliseconds."""
        name = self.containers.name_of(sandbox)
        self.frozen.add(sandbox)
        try:
            async with self.containers.launchers.gate.shut(name):
                return await stop.in_thread(self._copy_frozen, target, sandbox, stop)
        finally:
            self.frozen.discard(sandbox)

    def _copy_frozen(self, target: Path, sandbox: str, stop: Stop) -> float:
        began = time.monotonic()
        with frozen(cgroup_layout().container(self.containers.name_of(sandbox)).unified):
            self.containers.disks.save_open(sandbox, target, stop.check)
        return (time.monotonic() - began) * 1000

    def _publish(
        self, directory: Path, snapshot_id: str, source: Source, frozen_ms: float
    ) -> Snapshot:
        (directory / _SOURCE).unlink()
        size = sum(path.stat().st_blocks * 512 for path in directory.iterdir())
        snapshot = Snapshot(
            id=snapshot_id,
            sandbox=source.sandbox,
            image_id=source.image_id,
            disk_mb=source.limits.disk_size_mb,
            size_bytes=size,
            created_at=time.time(),
            frozen_ms=frozen_ms,
        )
        write_json(directory / _RECORD, asdict(snapshot))
        for path in [*directory.iterdir(), directory]:
            kernel.fsync(path)
        directory.rename(self._directory(snapshot_id))
        kernel.fsync(self.paths.snapshots)
        self._snapshots[snapshot_id] = snapshot
        return snapshot

    # Pieces --------------------------------------------------------------------------------

    @asynccontextmanager
    async def _used(self, snapshot_id: str) -> AsyncIterator[None]:
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
        self.store.release(snapshot.image_id, user_of(snapshot.id))

    def _require_room(self, size_bytes: int) -> None:
        try:
            self.containers.disks.require_room(size_bytes)
        except HostFull as error:
            raise HostFull(
                "The host's disk has no room for another copy of this sandbox's disk."
            ) from error

    def _directory(self, snapshot_id: str) -> Path:
        return self.paths.snapshots / snapshot_id


def user_of(snapshot_id: str) -> str:
    """The name by which a snapshot uses its image."""
    return f"snapshot.{snapshot_id}"


def users_of_images(paths: StatePaths) -> frozenset[str]:
    """The names of all snapshots there are, as users of images; those set aside are among them."""
    held = (one.name.removeprefix("snapshot.") for one in paths.quarantine.glob("snapshot.*"))
    names = [directory.name for directory in _directories(paths)]
    return frozenset(user_of(name.partition("~")[0]) for name in (*names, *held))


def clear_half_made(paths: StatePaths, instance: Instance, trash: Trash) -> None:
    """Drop what a killed agent was making; let the sandboxes go on that it had frozen for it."""
    for directory in paths.snapshots.glob(".*"):
        sandbox = (read_json(directory / _SOURCE) or {}).get("sandbox")
        if sandbox:
            Disks(paths, instance).thaw(str(sandbox))
            group = cgroup_layout().container(f"{instance.prefix}{sandbox}").unified
            freeze_group(group, frozen=False)
        trash.discard(directory)


@contextmanager
def frozen(group: Path) -> Iterator[None]:
    """Everything in a control group stands still in here.  Blocks; raises HostFault."""
    freeze_group(group, frozen=True)
    try:
        patience = Patience(FREEZE_SECONDS, lambda: pids_below(group))
        while not is_frozen(group):
            if patience.spent():
                raise HostFault("A process of the sandbox waits for the kernel; try again.")
            time.sleep(_POLL_SECONDS)
        yield
    finally:
        freeze_group(group, frozen=False)


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise HostFull("The host's disk became full while the copy was made.") from error
        raise HostFault(f"The snapshot could not be written: {error.strerror}.") from error


def _directories(paths: StatePaths) -> list[Path]:
    return sorted(paths.snapshots.glob("[!.]*"))


def read_snapshot(directory: Path, name: str | None = None) -> Snapshot:
    """The snapshot in a directory, of that name or its own.  Raises BadRecord."""
    path = directory / _RECORD
    one = read_record(path, _SNAPSHOT)
    if one is None:
        raise BadRecord(path, "it is gone")
    if one.id != (name or directory.name):
        raise BadRecord(path, f"it is the record of {one.id[:100]!r}")
    if not (directory / DISK_FILE).is_file():
        raise BadRecord(path, "its disk is gone")
    return one
