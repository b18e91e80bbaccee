"""The part of the host agent in memory that is about snapshots."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from hostruntime.errors import HostError, NotFound
from hostruntime.wire.sandboxes import SnapshotInfo

if TYPE_CHECKING:
    from tests.fakes.host import FakeSandbox


class FakeSnapshots:
    """``SnapshotCalls``; a snapshot's files are those of its sandbox when it was taken."""

    lock: threading.Condition
    _up: Callable[[], None]
    _running: Callable[[str], FakeSandbox]
    taken: dict[str, tuple[SnapshotInfo, dict[str, bytes]]]
    # What the next capture raises.
    capture_fails: HostError | None = None

    def create_snapshot(self, snapshot_id: str, sandbox_id: str) -> SnapshotInfo:
        """As the client."""
        box = self._running(sandbox_id)
        if self.capture_fails is not None:
            raise self.capture_fails
        with self.lock:
            if snapshot_id not in self.taken:
                now, image = time.time(), box.info.image
                info = SnapshotInfo(snapshot_id, sandbox_id, image, 10_240, 123_456_789, now)
                self.taken[snapshot_id] = (info, dict(box.files))
            return self.taken[snapshot_id][0]

    def snapshots(self) -> list[SnapshotInfo]:
        """As the client."""
        self._up()
        return [info for info, _ in self.taken.values()]

    def delete_snapshot(self, snapshot_id: str) -> None:
        """As the client."""
        self._up()
        with self.lock:
            self.taken.pop(snapshot_id, None)

    def restore(self, snapshot_id: str, box: FakeSandbox) -> None:
        """Give a sandbox a snapshot's files."""
        box.files.update(self.taken[snapshot_id][1])

    def image_of(self, snapshot_id: str) -> str:
        """The image below a snapshot; raises as the host."""
        if snapshot_id not in self.taken:
            raise NotFound(f"There is no snapshot {snapshot_id}.")
        return self.taken[snapshot_id][0].image
