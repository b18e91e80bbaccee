"""Reconciliation on the host's side: what nobody names is set aside, and kept for days.

Nothing is done here on the word of a database that is not this state's
(:mod:`hostruntime.host.installation`), and little without an operator's: a few things at a time.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial

from hostruntime.errors import Conflict
from hostruntime.host.installation import InstallationRecord, InstallationStore
from hostruntime.host.tasks import in_thread
from hostruntime.image.quarantine import Held, keep_days
from hostruntime.image.store import RECONCILE_MOST, ImageStore
from hostruntime.sandbox.snapshots import SnapshotManager, user_of
from hostruntime.wire.keeping import Claim, Reconcile, Reconciliation

_log = logging.getLogger(__name__)


@dataclass
class Keeping:
    """The keeping of one host's images and snapshots.  For one event loop."""

    book: InstallationStore
    store: ImageStore
    snapshots: SnapshotManager

    # Whose the state is --------------------------------------------------------------------

    async def standing(self) -> InstallationRecord:
        """Whose it is now (:meth:`InstallationStore.read`)."""
        return await in_thread(self.book.read)

    async def adopt(self, claim: Claim) -> InstallationRecord:
        """Give it to a database, by an operator's word (:meth:`InstallationStore.adopt`)."""
        return await in_thread(self.book.adopt, claim)

    async def agree(self, claim: Claim, *, known: bool | None) -> InstallationRecord:
        """Take down the database's new mark (:meth:`InstallationStore.agree`).

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
            one = await self.snapshots.reconcile(set(asked.snapshots), RECONCILE_MOST)
            set_aside, waiting = one[0], one[1]
        if asked.images is not None:
            await in_thread(self.store.set_aside_damaged)
            two = await in_thread(self.store.reconcile, set(asked.images))
            set_aside, waiting = [*set_aside, *two[0]], [*waiting, *two[1]]
        for held in await in_thread(self.store.quarantine.purge, keep_days()):
            await in_thread(self._release, held)
        return Reconciliation(set_aside, waiting)

    # What was set aside --------------------------------------------------------------------

    async def held(self) -> list[Held]:
        """Everything in quarantine, the oldest first."""
        return await in_thread(self.store.quarantine.list)

    async def restore(self, key: str) -> Held:
        """Put an image or a snapshot back.  Raises NotFound, Conflict."""
        held = await in_thread(self.store.quarantine.get, key)
        if held.kind == "image":
            await in_thread(self.store.restore, held)
        elif held.kind == "snapshot":
            await in_thread(self.snapshots.restore_held, held)
        else:
            raise Conflict(f"The record of a {held.kind} cannot be put back: what it was of ended.")
        _log.warning("%s %s was put back from quarantine", held.kind, held.name)
        return held

    async def delete(self, key: str) -> None:
        """Delete something for good.  Raises NotFound, OSError."""
        held = await in_thread(self.store.quarantine.get, key)
        await in_thread(self.store.quarantine.delete, key)
        await in_thread(self._release, held)

    def _release(self, held: Held) -> None:
        """A snapshot that is no more lets go of the image it was made over."""
        if held.kind == "snapshot":
            self.store.release_all(user_of(held.name))

    def _templates(self) -> bool:
        return any(image.manifest.kind == "template" for image in self.store.list())
