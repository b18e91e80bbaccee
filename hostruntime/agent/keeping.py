"""Reconciliation on the host's side: what nobody names is set aside, and kept for days.

Nothing is done here on the word of a database that is not this state's
(:mod:`hostruntime.host.installation`), and little without an operator's: a few things at a time.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial

from hostruntime.errors import Conflict
from hostruntime.host.installation import InstallationBook, Standing
from hostruntime.host.tasks import in_thread
from hostruntime.image.quarantine import QuarantinedItem, retention_days
from hostruntime.image.store import RECONCILE_LIMIT, ImageStore
from hostruntime.sandbox.snapshots import SnapshotManager, user_of
from hostruntime.wire.keeping import Claim, Reconcile, Reconciliation

_log = logging.getLogger(__name__)


@dataclass
class Keeping:
    """The keeping of one host's images and snapshots.  For one event loop."""

    book: InstallationBook
    store: ImageStore
    snapshots: SnapshotManager

    # Whose the state is --------------------------------------------------------------------

    async def standing(self) -> Standing:
        """Whose it is now (:meth:`InstallationBook.read`)."""
        return await in_thread(self.book.read)

    async def adopt(self, claim: Claim) -> Standing:
        """Give it to a database, by an operator's word (:meth:`InstallationBook.adopt`)."""
        return await in_thread(self.book.adopt, claim)

    async def agree(self, claim: Claim, *, known: bool | None) -> Standing:
        """Take down the database's new mark (:meth:`InstallationBook.agree`).

        ``known`` is None as long as nobody has looked.
        """
        empty = not self.snapshots.list() and not await in_thread(self._templates)
        if known is False:
            await in_thread(partial(self.book.refuse, empty=empty))
        return await in_thread(partial(self.book.agree, claim, empty=empty, known=bool(known)))

    async def reconcile(self, asked: Reconcile) -> Reconciliation:
        """Set aside what is not among those named; None names all.

        Raises InstallationMismatch, OSError.
        """
        await in_thread(self.book.require, asked.installation)
        set_aside: list[str] = []
        waiting: list[str] = []
        if asked.snapshots is not None:
            one = await self.snapshots.reconcile(set(asked.snapshots), RECONCILE_LIMIT)
            set_aside, waiting = one[0], one[1]
        if asked.images is not None:
            await in_thread(self.store.quarantine_damaged)
            two = await in_thread(self.store.reconcile, set(asked.images))
            set_aside, waiting = [*set_aside, *two[0]], [*waiting, *two[1]]
        for item in await in_thread(self.store.quarantine.purge, retention_days()):
            await in_thread(self._release, item)
        return Reconciliation(set_aside, waiting)

    # What was set aside --------------------------------------------------------------------

    async def held(self) -> list[QuarantinedItem]:
        """Everything in quarantine, the oldest first."""
        return await in_thread(self.store.quarantine.list)

    async def restore(self, key: str) -> QuarantinedItem:
        """Put an image or a snapshot back.  Raises NotFound, Conflict."""
        item = await in_thread(self.store.quarantine.get, key)
        if item.kind == "image":
            await in_thread(self.store.restore, item)
        elif item.kind == "snapshot":
            await in_thread(self.snapshots.restore_held, item)
        else:
            raise Conflict(f"The record of a {item.kind} cannot be put back: what it was of ended.")
        _log.warning("%s %s was put back from quarantine", item.kind, item.name)
        return item

    async def delete(self, key: str) -> None:
        """Delete something for good.  Raises NotFound, OSError."""
        item = await in_thread(self.store.quarantine.get, key)
        await in_thread(self.store.quarantine.delete, key)
        await in_thread(self._release, item)

    def _release(self, item: QuarantinedItem) -> None:
        """A snapshot that is no more lets go of the image it was made over."""
        if item.kind == "snapshot":
            self.store.release_all(user_of(item.name))

    def _templates(self) -> bool:
        return any(image.manifest.kind == "template" for image in self.store.list())
