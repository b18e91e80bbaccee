"""Where the web process listens, and whom it believes about who its clients are.

It speaks plain HTTP, so it listens on this machine's own addresses unless the operator says
otherwise.  What comes through a proxy of the operator's says in ``X-Forwarded-For`` and
``X-Forwarded-Proto`` who asked, and how; anybody else could claim anything there, so from them
those headers are taken off before any code sees them.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

type Network = IPv4Network | IPv6Network
type Address = IPv4Address | IPv6Address
type Scope = dict[str, Any]
type Application = Callable[[Any, Any, Any], Awaitable[None]]

EVERYWHERE = "all"
FORWARDED = frozenset({b"x-forwarded-for", b"x-forwarded-proto"})
LOOPBACK = "127.0.0.0/8,::1"


def listen_addresses(text: str | None) -> list[str]:
    """The addresses to listen on: loopback for nothing, every one for ``all``, else a comma list.

    Raises ``ValueError`` with what to write instead.
    """
    wanted = (text or "").strip()
    if not wanted:
        return ["127.0.0.1", *(["::1"] if _has_ipv6() else [])]
    if wanted == EVERYWHERE:
        return ["::"] if socket.has_dualstack_ipv6() else ["0.0.0.0"]  # noqa: S104 - asked for
    try:
        return [str(ip_address(one.strip())) for one in wanted.split(",")]
    except ValueError:
        raise ValueError(
            f"ORKESTR_LISTEN is {wanted!r}: give addresses of this machine with commas between "
            "them, or `all`, or leave it unset to listen on this machine alone"
        ) from None


def _has_ipv6() -> bool:
    with suppress(OSError), socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
        probe.bind(("::1", 0))
        return True
    return False


def trusted_proxies(text: str | None) -> list[Network]:
    """The networks of a comma list; this machine's loopback for nothing.

    Raises ``ValueError`` with what to write instead.
    """
    try:
        return [ip_network(one.strip()) for one in ((text or "").strip() or LOOPBACK).split(",")]
    except ValueError:
        raise ValueError(
            f"ORKESTR_TRUSTED_PROXIES is {text!r}: give addresses or networks such as 10.0.0.0/24 "
            "with commas between them, or leave it unset if the proxy is on this machine"
        ) from None


class ForwardedBy:
    """An ASGI application whose clients are who a trusted proxy says, if one is in between.

    Trusts ``proxies`` alone, and nobody where there are none.
    """

    def __init__(self, application: Application, proxies: Iterable[Network]) -> None:
        self._application = application
        self._proxies = tuple(proxies)

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Answer one connection."""
        if "headers" in scope:
            scope = self._told(scope) if self._trusts(_peer(scope)) else _untold(scope)
        await self._application(scope, receive, send)

    def _trusts(self, address: Address | None) -> bool:
        return address is not None and any(address in network for network in self._proxies)

    def _told(self, scope: Scope) -> Scope:
        """The nearest address that is no proxy's: what stands before it the client may claim."""
        given = b",".join(v for name, v in scope["headers"] if name == b"x-forwarded-for")
        for one in reversed(given.decode("latin-1").split(",")):
            address = _address(one.strip())
            if address is None:
                break
            scope = {**scope, "client": [str(address), 0]}
            if not self._trusts(address):
                break
        return scope


def _untold(scope: Scope) -> Scope:
    kept = [(name, value) for name, value in scope["headers"] if name not in FORWARDED]
    return {**scope, "headers": kept}


def _peer(scope: Scope) -> Address | None:
    client = scope.get("client")
    return _address(client[0]) if client else None


def _address(text: str) -> Address | None:
    try:
        return ip_address(text)
    except ValueError:
        return None
