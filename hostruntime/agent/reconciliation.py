"""Reconciliation on the host's side: what no row names is set aside, and kept for days.

A database that does not belong to this state directory is refused
(:mod:`hostruntime.host.installation`), and a pass sets only a few items aside.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial

from hostruntime.errors import Conflict
from hostruntime.host.installation import InstallationRecord, InstallationStore
from hostruntime.host.tasks import in_thread
from hostruntime.image.quarantine import QuarantinedItem, retention_days
from hostruntime.image.store import RECONCILE_LIMIT, ImageStore
from hostruntime.sandbox.snapshots import SnapshotManager, image_user
from hostruntime.volume.manager import VolumeManager
from hostruntime.wire.reconciliation import Claim, Reconcile, Reconciliation

_log = logging.getLogger(__name__)


@dataclass
class Reconciler:
    """Reconciles one host's images and snapshots.  For use on one event loop."""

    installation_store: InstallationStore
    store: ImageStore
    snapshots: SnapshotManager
    volumes: VolumeManager

    # Ownership of the state ----------------------------------------------------------------

    async def installation(self) -> InstallationRecord:
        """Which installation owns the state (:meth:`InstallationStore.read`)."""
        return await in_thread(self.installation_store.read)

    async def adopt(self, claim: Claim) -> InstallationRecord:
        """Assign it to a database on an operator's decision (:meth:`InstallationStore.adopt`)."""
        return await in_thread(self.installation_store.adopt, claim)

    async def agree(self, claim: Claim, *, known: bool | None) -> InstallationRecord:
        """Record the database's new mark (:meth:`InstallationStore.agree`).

        ``known`` is None if the database has not been checked yet.
        """
        empty = not self.snapshots.list() and not await in_thread(self._data)
        if known is False:
            await in_thread(partial(self.installation_store.refuse, empty=empty))
        return await in_thread(
            partial(self.installation_store.agree, claim, empty=empty, known=bool(known))
        )

    async def reconcile(self, request: Reconcile) -> Reconciliation:
        """Set aside what the request does not name; None names everything.  No volume ever is.

        Raises InstallationMismatch, OSError.
        """
        await in_thread(self.installation_store.require, request.installation)
        set_aside: list[str] = []
        waiting: list[str] = []
        if request.snapshots is not None:
            set_aside, waiting = await self.snapshots.reconcile(
                set(request.snapshots), RECONCILE_LIMIT
            )
        if request.images is not None:
            await in_thread(self.store.quarantine_damaged)
            images = await in_thread(self.store.reconcile, set(request.images))
            set_aside, waiting = [*set_aside, *images[0]], [*waiting, *images[1]]
        for item in await in_thread(self.store.quarantine.purge, retention_days()):
            await in_thread(self._release, item)
        return Reconciliation(set_aside, waiting)

    # Quarantine ----------------------------------------------------------------------------

    async def quarantined(self) -> list[QuarantinedItem]:
        """Everything in quarantine, oldest first."""
        return await in_thread(self.store.quarantine.list)

    async def restore(self, key: str) -> QuarantinedItem:
        """Restore an image or a snapshot.  Raises NotFound, Conflict."""
        item = await in_thread(self.store.quarantine.get, key)
        if item.kind == "image":
            await in_thread(self.store.restore, item)
        elif item.kind == "snapshot":
            await in_thread(self.snapshots.restore_quarantined, item)
        else:
            raise Conflict(
                f"The record of a {item.kind} cannot be restored: its {item.kind} no longer exists."
            )
        _log.warning("%s %s was restored from quarantine", item.kind, item.name)
        return item

    async def delete(self, key: str) -> None:
        """Delete an item permanently.  Raises NotFound, OSError."""
        item = await in_thread(self.store.quarantine.get, key)
        await in_thread(self.store.quarantine.delete, key)
        await in_thread(self._release, item)

    def _release(self, item: QuarantinedItem) -> None:
        """Release the image that a deleted snapshot was based on."""
        if item.kind == "snapshot":
            self.store.release_all(image_user(item.name))

    def _data(self) -> bool:
        """Whether there are templates or volumes."""
        if self.volumes.store.ids():
            return True
        return any(image.manifest.kind == "template" for image in self.store.list())
