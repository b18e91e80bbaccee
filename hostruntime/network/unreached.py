"""Allowed hosts that could not be reached, told from what Squid logs: no refusal of any policy.

A name without an address is refused at the proxy's first port (503).  What happens behind that
only the second port sees, inside of a tunnel that a client has already been promised: it logs how
a connection failed, under the port that the first one connected from, and the first one whose it
was.  How a connection failed Squid does not say there; a host that refuses one does so at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

CONNECT_SECONDS = 20
# An answer that the network is in no hurry to give: no route, no such neighbour (3 s).
_AT_ONCE_MS = 2_000
# Both ports write their lines when the same connection ends.
_APART_SECONDS = 5.0
_FAILED, _CONNECT_FAILED = 500, 503


@dataclass(frozen=True)
class Unreached:
    """An allowed host that was not reached; ``reason`` is a word, ``message`` a sentence."""

    at: float
    host: str
    port: int
    reason: str
    message: str


def without_address(entries: Iterable[Mapping[str, Any]]) -> list[Unreached]:
    """The hosts whose names the proxy found no address for."""
    return [_unreached(entry, "no_address") for entry in entries]


def broken_tunnels(
    tunnels: Iterable[Mapping[str, Any]], failures: Iterable[Mapping[str, Any]]
) -> list[Unreached]:
    """What of one container's ``tunnels`` came to nothing, by the second port's ``failures``."""
    by_port: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for failure in failures:
        if failure["status"] < _FAILED:
            continue
        by_port.setdefault((str(failure["via"]), str(failure["host"])), []).append(failure)
    found = []
    for tunnel in tunnels:
        known = by_port.get((str(tunnel.get("via")), str(tunnel["host"])), [])
        near = [one for one in known if abs(one["at"] - tunnel["at"]) <= _APART_SECONDS]
        if reason := _reason(near):
            found.append(_unreached(tunnel, reason))
    return found


def _reason(failures: list[Mapping[str, Any]]) -> str | None:
    refused = [failure for failure in failures if failure["status"] == _CONNECT_FAILED]
    if not refused:
        return "no_tls" if failures else None
    took = max(int(failure["ms"]) for failure in refused)
    if took <= _AT_ONCE_MS:
        return "connection_refused"
    return "timed_out" if took >= CONNECT_SECONDS * 900 else "no_route"


_SENTENCES = {
    "no_address": "its name has no address: the DNS of this machine does not know it",
    "connection_refused": "it refused the connection: nothing listens there, or a firewall says no",
    "no_route": "no way leads to it from this machine",
    "timed_out": f"it did not answer within {CONNECT_SECONDS} seconds: the connection timed out",
    "no_tls": "it answered with something that is no TLS",
}


def _unreached(entry: Mapping[str, Any], reason: str) -> Unreached:
    host = str(entry["host"])
    message = f"{host} is allowed, but could not be reached: {_SENTENCES[reason]}"
    return Unreached(float(entry["at"]), host, int(entry.get("port", 443)), reason, message)
