"""The part of the host's client that is about snapshots of sandboxes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx

from hostruntime.client.answers import SnapshotInfo
from hostruntime.client.wire import timeouts

# All of a sandbox's disk is copied before the answer comes.
CAPTURE_TIMEOUT = timeouts(read=600.0)


class SnapshotCalls:
    """What :class:`hostruntime.client.host_client.HostClient` can do with snapshots."""

    _send: Callable[..., httpx.Response]
    _json: Callable[..., dict[str, Any]]

    def create_snapshot(self, snapshot_id: str, sandbox_id: str) -> SnapshotInfo:
        """Take a snapshot of a running sandbox's files; the same id again answers that there is.

        Raises NotFound, ContainerGone, Conflict (one is being taken), HostFull; then nothing was
        made.
        """
        path, body = f"/sandboxes/{sandbox_id}/snapshots", {"id": snapshot_id}
        answer = self._json("POST", path, body=body, timeout=CAPTURE_TIMEOUT)
        return SnapshotInfo.from_wire(answer)

    def snapshots(self) -> list[SnapshotInfo]:
        """Every snapshot on the host, oldest first."""
        return [
            SnapshotInfo.from_wire(item) for item in self._json("GET", "/snapshots")["snapshots"]
        ]

    def delete_snapshot(self, snapshot_id: str) -> None:
        """Delete a snapshot, when nobody is just starting from it; idempotent."""
        self._send("DELETE", f"/snapshots/{snapshot_id}")
