"""The part of the host agent in memory that is about reconciliation and quarantine."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from hostruntime.errors import ImageNotFound, NotFound
from hostruntime.host.installation import InstallationStore
from hostruntime.host.paths import StatePaths
from hostruntime.image.store import RECONCILE_LIMIT
from hostruntime.sandbox.snapshots import RECONCILE_AGE_SECONDS
from hostruntime.wire.images import ImageInfo
from hostruntime.wire.reconciliation import (
    Claim,
    InstallationInfo,
    QuarantinedItemInfo,
    Reconcile,
    Reconciliation,
)
from hostruntime.wire.sandboxes import SnapshotInfo


class FakeKeeping:
    """``KeepingCalls``, over a real book; images are of any age."""

    lock: threading.Condition
    _up: Callable[[], None]
    stored: dict[str, ImageInfo]
    taken: dict[str, tuple[SnapshotInfo, dict[str, bytes]]]

    @cached_property
    def _directory(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(prefix="orkestr-fake-")

    @property
    def book(self) -> InstallationStore:
        return InstallationStore(StatePaths(Path(self._directory.name)))

    @cached_property
    def held(self) -> dict[str, tuple[QuarantinedItemInfo, Any]]:
        return {}

    def installation(self) -> InstallationInfo:
        """As the client."""
        self._up()
        return self.book.read().info()

    def agree(self, claim: Claim, *, known: bool | None = None) -> InstallationInfo:
        """As the client."""
        self._up()
        empty = not self.stored and not self.taken
        if known is False:
            self.book.refuse(empty=empty)
        return self.book.agree(claim, empty=empty, known=bool(known)).info()

    def adopt(self, claim: Claim) -> InstallationInfo:
        """As the client."""
        self._up()
        return self.book.adopt(claim).info()

    def reconcile(self, request: Reconcile) -> Reconciliation:
        """As the client."""
        self._up()
        self.book.require(request.installation)
        done, waiting = [], []
        kinds: list[tuple[str, dict[str, Any], Sequence[str] | None]] = [
            ("snapshot", self.taken, request.snapshots),
            ("image", self.stored, request.images),
        ]
        for kind, there, named in kinds:
            surplus = [] if named is None else [one for one in there if one not in named]
            if kind == "snapshot":
                oldest = time.time() - RECONCILE_AGE_SECONDS
                surplus = [one for one in surplus if there[one][0].created_at < oldest]
            for name in surplus[:RECONCILE_LIMIT]:
                key = f"{kind}.{name}"
                info = QuarantinedItemInfo(
                    key, kind, name, "unknown", "nobody names it", time.time(), 10**6
                )
                self.held[key] = (info, there.pop(name))
            done += surplus[:RECONCILE_LIMIT]
            waiting += surplus[RECONCILE_LIMIT:]
        return Reconciliation(done, waiting)

    def image(self, image_id: str) -> ImageInfo:
        """As the client."""
        self._up()
        if image_id not in self.stored:
            raise ImageNotFound(f"There is no image {image_id}.")
        return self.stored[image_id]

    def quarantine(self) -> list[QuarantinedItemInfo]:
        """As the client."""
        self._up()
        return [info for info, _ in self.held.values()]

    def restore_quarantined(self, key: str) -> QuarantinedItemInfo:
        """As the client."""
        info, content = self._held(key)
        there: dict[str, Any] = self.stored if info.kind == "image" else self.taken
        there[info.name] = content
        del self.held[key]
        return info

    def delete_quarantined(self, key: str) -> None:
        """As the client."""
        self._held(key)
        del self.held[key]

    def _held(self, key: str) -> tuple[QuarantinedItemInfo, Any]:
        self._up()
        if key not in self.held:
            raise NotFound(f"There is nothing called {key!r} in quarantine.")
        return self.held[key]
