"""Find allowed hosts that could not be reached, from Squid's logs; not refusals by the policy.

A name without an address is refused at the proxy's first port (503). Later failures are only seen
by the second port, inside a tunnel whose client already got a success response: it logs the
failure with the source port of the first port's connection, and the first port logs whose tunnel
that was. Squid does not log the cause; a host that refuses a connection does so immediately.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

CONNECT_SECONDS = 20
# Slower responses come from the network: no route, no such neighbour (3 s).
_IMMEDIATE_MS = 2_000
# Both ports log when the same connection closes.
_MATCH_SECONDS = 5.0
_FAILED, _CONNECT_FAILED = 500, 503


@dataclass(frozen=True)
class UnreachedHost:
    """An allowed host that was not reached; ``reason`` is a code, ``message`` a sentence."""

    at: float
    host: str
    port: int
    reason: str
    message: str


def unresolved_hosts(entries: Iterable[Mapping[str, Any]]) -> list[UnreachedHost]:
    """Return the hosts whose names the proxy could not resolve."""
    return [_unreached(entry, "no_address") for entry in entries]


def failed_tunnels(
    tunnels: Iterable[Mapping[str, Any]], failures: Iterable[Mapping[str, Any]]
) -> list[UnreachedHost]:
    """Match one container's ``tunnels`` with the second port's ``failures``; return the failed."""
    by_port: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for failure in failures:
        if failure["status"] < _FAILED:
            continue
        by_port.setdefault((str(failure["via"]), str(failure["host"])), []).append(failure)
    found = []
    for tunnel in tunnels:
        candidates = by_port.get((str(tunnel.get("via")), str(tunnel["host"])), [])
        matching = [
            failure for failure in candidates if abs(failure["at"] - tunnel["at"]) <= _MATCH_SECONDS
        ]
        if reason := _reason(matching):
            found.append(_unreached(tunnel, reason))
    return found


def _reason(failures: list[Mapping[str, Any]]) -> str | None:
    refused = [failure for failure in failures if failure["status"] == _CONNECT_FAILED]
    if not refused:
        return "no_tls" if failures else None
    duration_ms = max(int(failure["ms"]) for failure in refused)
    if duration_ms <= _IMMEDIATE_MS:
        return "connection_refused"
    return "timed_out" if duration_ms >= CONNECT_SECONDS * 900 else "no_route"


_SENTENCES = {
    "no_address": "its name has no address in this machine's DNS",
    "connection_refused": "it refused the connection: nothing listens there, or a firewall did",
    "no_route": "there is no route to it from this machine",
    "timed_out": f"it did not answer within {CONNECT_SECONDS} seconds: the connection timed out",
    "no_tls": "its response was not TLS",
}


def _unreached(entry: Mapping[str, Any], reason: str) -> UnreachedHost:
    host = str(entry["host"])
    message = f"{host} is allowed, but could not be reached: {_SENTENCES[reason]}"
    return UnreachedHost(float(entry["at"]), host, int(entry.get("port", 443)), reason, message)
