"""The part of the host's client that is about reconciliation and quarantine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any
from urllib.parse import quote

import httpx

from hostruntime.client.answers import HeldInfo, Reconciliation, StandingInfo
from hostruntime.host.installation import Claim


class KeepingCalls:
    """What :class:`hostruntime.client.host_client.HostClient` can do about what belongs to
    nobody."""

    _send: Callable[..., httpx.Response]
    _json: Callable[..., dict[str, Any]]

    def installation(self) -> StandingInfo:
        """Which installation the state directory says it is of."""
        return StandingInfo.from_wire(self._json("GET", "/installation"))

    def agree(self, claim: Claim, *, known: bool | None = None) -> StandingInfo:
        """Tell of the database's new mark; ``known`` says whether it knows what the host holds.

        Raises StateUnclaimed (say what is ``known``), InstallationMismatch.
        """
        body = asdict(claim) | {"known": known}
        return StandingInfo.from_wire(self._json("POST", "/installation/agree", body=body))

    def adopt(self, claim: Claim) -> StandingInfo:
        """An operator's word that database and state belong together."""
        return StandingInfo.from_wire(self._json("POST", "/installation/adopt", body=asdict(claim)))

    def reconcile(
        self,
        claim: Claim,
        *,
        images: Sequence[str] | None = None,
        snapshots: Sequence[str] | None = None,
    ) -> Reconciliation:
        """Set aside some of what is not among those named; None names all of that kind.

        Raises InstallationMismatch.
        """
        body = {
            "installation": asdict(claim),
            "images": None if images is None else list(images),
            "snapshots": None if snapshots is None else list(snapshots),
        }
        return Reconciliation.from_wire(self._json("POST", "/reconcile", body=body))

    def quarantine(self) -> list[HeldInfo]:
        """What was set aside, the oldest first."""
        answer = self._json("GET", "/quarantine")
        return [HeldInfo.from_wire(item) for item in answer["quarantine"]]

    def restore_held(self, key: str) -> HeldInfo:
        """Put back what was set aside.  Raises NotFound, Conflict."""
        path = f"/quarantine/{quote(key, safe='')}/restore"
        return HeldInfo.from_wire(self._json("POST", path))

    def delete_held(self, key: str) -> None:
        """Delete for good what was set aside.  Raises NotFound."""
        self._send("DELETE", f"/quarantine/{quote(key, safe='')}")
