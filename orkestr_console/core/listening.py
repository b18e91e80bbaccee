"""Where the web process listens, and which proxies it trusts to name its clients.

It serves plain HTTP, so it listens on this machine's loopback addresses unless the operator sets
others. A proxy of the operator's puts the client's address and protocol into ``X-Forwarded-For``
and ``X-Forwarded-Proto``; anybody else could claim anything there, so those headers are removed
from untrusted requests before any code sees them.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

type Network = IPv4Network | IPv6Network
type Address = IPv4Address | IPv6Address
type Scope = dict[str, Any]
type Application = Callable[[Any, Any, Any], Awaitable[None]]

ALL_ADDRESSES = "all"
FORWARDED_HEADERS = frozenset({b"x-forwarded-for", b"x-forwarded-proto"})
LOOPBACK = "127.0.0.0/8,::1"
# Connections that may wait to be accepted; the kernel lowers it to net.core.somaxconn (listen(2)).
BACKLOG = 4096


def listen_addresses(text: str | None) -> list[str]:
    """The addresses to listen on: loopback if unset, all for ``all``, else a comma list.

    Raises ``ValueError`` with the fix.
    """
    wanted = (text or "").strip()
    if not wanted:
        return ["127.0.0.1", *(["::1"] if _has_ipv6() else [])]
    if wanted == ALL_ADDRESSES:
        return ["::"] if socket.has_dualstack_ipv6() else ["0.0.0.0"]  # noqa: S104 - asked for
    try:
        return [str(ip_address(address.strip())) for address in wanted.split(",")]
    except ValueError:
        raise ValueError(
            f"ORKESTR_LISTEN is {wanted!r}: give addresses of this machine with commas between "
            "them, or `all`, or leave it unset to listen on this machine alone"
        ) from None


def listen_on(addresses: Iterable[str], port: int) -> list[socket.socket]:
    """Sockets that listen on ``port`` of each address. Raises ``OSError`` naming the address."""
    listening: list[socket.socket] = []
    for address in addresses:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        made = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        listening.append(made)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind((address, port))
            made.listen(BACKLOG)
        except OSError as error:
            for each in listening:
                each.close()
            raise OSError(error.errno, f"{address}: {error.strerror}") from error
    return listening


def _has_ipv6() -> bool:
    with suppress(OSError), socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
        probe.bind(("::1", 0))
        return True
    return False


def trusted_proxies(text: str | None) -> list[Network]:
    """The networks of a comma list; this machine's loopback if unset.

    Raises ``ValueError`` with the fix.
    """
    try:
        return [
            ip_network(network.strip()) for network in ((text or "").strip() or LOOPBACK).split(",")
        ]
    except ValueError:
        raise ValueError(
            f"ORKESTR_TRUSTED_PROXIES is {text!r}: give addresses or networks such as 10.0.0.0/24 "
            "with commas between them, or leave it unset if the proxy is on this machine"
        ) from None


class TrustedProxies:
    """An ASGI application that takes the client's address from trusted proxies.

    Trusts only ``proxies``; without any, nobody.
    """

    def __init__(self, application: Application, proxies: Iterable[Network]) -> None:
        self._application = application
        self._proxies = tuple(proxies)

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Answer one connection."""
        if "headers" in scope:
            scope = (
                self.apply_forwarded(scope)
                if self.trusts(_peer(scope))
                else _strip_forwarded(scope)
            )
        await self._application(scope, receive, send)

    def trusts(self, address: Address | None) -> bool:
        """Whether a client's address is a trusted proxy's."""
        return address is not None and any(address in network for network in self._proxies)

    def apply_forwarded(self, scope: Scope) -> Scope:
        """Set the client to the last address that is not a proxy's: earlier ones can be forged."""
        forwarded = b",".join(v for name, v in scope["headers"] if name == b"x-forwarded-for")
        if not forwarded:
            return scope
        for part in reversed(forwarded.decode("latin-1").split(",")):
            address = _address(part.strip())
            if address is None:
                break
            scope = {**scope, "client": [str(address), 0]}
            if not self.trusts(address):
                break
        return scope


def visitor_address(
    peer: str, headers: Iterable[tuple[bytes, bytes]], proxies: Iterable[Network]
) -> str:
    """The address of a client that came from ``peer``, by what ``proxies`` say of it, if it did."""
    trusted = TrustedProxies(_no_application, proxies)
    scope: Scope = {"client": [peer, 0], "headers": list(headers)}
    if trusted.trusts(_peer(scope)):
        scope = trusted.apply_forwarded(scope)
    return str(scope["client"][0])


async def _no_application(scope: Scope, receive: Any, send: Any) -> None:
    raise AssertionError("it is not called")


def _strip_forwarded(scope: Scope) -> Scope:
    headers = [(name, value) for name, value in scope["headers"] if name not in FORWARDED_HEADERS]
    return {**scope, "headers": headers}


def _peer(scope: Scope) -> Address | None:
    client = scope.get("client")
    return _peer_address(client[0]) if client else None


# Of connections, which have many requests, and not of headers, which can say anything.
@lru_cache(maxsize=1000)
def _peer_address(text: str) -> Address | None:
    return _address(text)


def _address(text: str) -> Address | None:
    try:
        return ip_address(text)
    except ValueError:
        return None
