"""Which sandbox has which volume: attached before it starts, released after it has ended.

Which sandboxes have one is in their own records (``request.volume``), so a new agent knows it as
soon as it has read those; nothing is written twice.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hostruntime.container.disk import DiskSize
from hostruntime.errors import HostFault, VolumeInUse
from hostruntime.host.patience import scaled
from hostruntime.host.tasks import KeyedLocks, in_thread
from hostruntime.volume.store import VolumeStore
from hostruntime.wire.volumes import AttachVolume, VolumeInfo

# The longest that a sandbox may have to wait to write to a volume that is being copied.
COPY_SECONDS = 60.0
Infos = list[VolumeInfo]


@dataclass
class VolumeManager:
    """The volumes of one host.  For use on one event loop."""

    store: VolumeStore
    # The sandbox that has a volume, by the volume's id; from before it is mounted until after.
    _holders: dict[str, str] = field(default_factory=dict)
    _locks: KeyedLocks = field(default_factory=KeyedLocks)

    def recover(self, attached: Mapping[str, str]) -> None:
        """Take note of the sandboxes of the previous agent that run, by volume.

        Blocks; raises OSError.
        """
        self._holders = dict(attached)
        # Of one that has just ended, too.
        self.store.recover(attached)

    def mount_point(self, request: AttachVolume | None) -> Path | None:
        """Where a sandbox's volume is mounted on the host; None if it has none."""
        return None if request is None else self.store.mount_point(request.id)

    async def attach(self, request: AttachVolume | None, sandbox_id: str) -> None:
        """Give a sandbox that is about to start its volume, if it has one.

        Raises like :meth:`VolumeStore.attach`; then it has none.
        """
        if request is None:
            return
        async with self._locks.holding(request.id):
            if request.id in self._holders:
                raise VolumeInUse("The volume is in use by another sandbox.")
            await in_thread(self.store.attach, request)
            self._holders[request.id] = sandbox_id

    async def keep(self, request: AttachVolume | None) -> None:
        """The sandbox runs: its volume stays, also if it is new.  Raises OSError."""
        if request is not None and request.new:
            await in_thread(self.store.keep, request.id)

    async def release(self, request: AttachVolume | None, sandbox_id: str) -> None:
        """Take the volume from a sandbox whose container has been dismantled; idempotent.

        Raises OSError if it cannot be unmounted: it then stays that sandbox's.
        """
        if request is None:
            return
        async with self._locks.holding(request.id):
            if self._holders.get(request.id) != sandbox_id:
                return
            await in_thread(self.store.detach, request.id)
            await in_thread(self.store.discard_unfinished, request.id)
            del self._holders[request.id]

    async def delete(self, volume_id: str) -> None:
        """Delete a volume with all that is on it; idempotent.  Raises VolumeInUse, OSError."""
        async with self._locks.holding(volume_id):
            if volume_id in self._holders:
                raise VolumeInUse("The volume is in use by a sandbox.")
            await in_thread(self.store.delete, volume_id)

    async def copy(self, volume_id: str) -> Path:
        """Copy a volume as of one instant (:meth:`VolumeStore.copy`), within ``COPY_SECONDS``.

        Raises VolumeMissing, HostFull, HostFault, OSError.
        """
        until = time.monotonic() + scaled(COPY_SECONDS)

        def check() -> None:
            if time.monotonic() > until:
                raise HostFault(
                    "Copying the volume takes too long for a sandbox to wait that is using it; try "
                    "again when none is."
                )

        async with self._locks.holding(volume_id):
            return await in_thread(self.store.copy, volume_id, check)

    def list(self) -> Infos:
        """All volumes.  Blocks; raises OSError."""
        found: Infos = []
        for volume_id in self.store.ids():
            try:
                used, size_mb = self.store.used(volume_id), self.store.size_mb(volume_id)
            except FileNotFoundError:
                continue  # Deleted meanwhile.
            holder = self._holders.get(volume_id)
            found.append(VolumeInfo(volume_id, size_mb, used.allocated, holder))
        return found

    def sizes(self) -> dict[str, DiskSize]:
        """The space that attached volumes take, by sandbox.  Blocks."""
        sizes: dict[str, DiskSize] = {}
        for volume_id, sandbox_id in list(self._holders.items()):
            try:
                sizes[sandbox_id] = self.store.used(volume_id)
            except OSError:
                continue
        return sizes
