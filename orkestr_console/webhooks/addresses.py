"""Which addresses a webhook may reach: none that a sandbox may not, and none of this machine.

A host name is resolved once for each delivery. Its addresses are checked, and one of those that
were checked is connected to, so a name that changes meanwhile (DNS rebinding) changes nothing.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit

from django.conf import settings

from hostruntime.network.policy import Address, is_denied

# Without the address: what the names inside of a network stand for is not a tenant's business.
NOT_PUBLIC = "it leads to an address that is not public, and webhooks reach no others"
OURS = "it leads to this server itself, which webhooks do not reach"
DEFAULT_PORTS = {"http": 80, "https": 443}


class UnreachableTarget(Exception):  # noqa: N818 - not an error of ours
    """Why a webhook's address cannot be used, as the end of a sentence about it."""


@dataclass(frozen=True)
class Target:
    """The parts of a webhook's address that a request needs."""

    scheme: str
    # Without the brackets of an IPv6 address.
    host: str
    port: int
    # The path and the query.
    path: str

    @property
    def authority(self) -> str:
        """The value of the ``Host`` header (RFC 9110, section 7.2)."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def is_https(self) -> bool:
        """Whether it is encrypted."""
        return self.scheme == "https"


def parse_target(url: str) -> Target:
    """The parts of an address that :mod:`orkestr_console.webhooks.specs` has accepted."""
    parts = urlsplit(url)
    path = f"{parts.path or '/'}{f'?{parts.query}' if parts.query else ''}"
    port = parts.port or DEFAULT_PORTS[parts.scheme]
    return Target(parts.scheme, parts.hostname or "", port, path)


def resolve(target: Target) -> list[Address]:
    """The addresses to try, in their order. Raises :class:`UnreachableTarget`.

    If any of them is forbidden, all are: a public service has no private addresses. Waits for the
    resolver, which gives up within about half a minute (resolv.conf(5)).
    """
    try:
        found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UnreachableTarget("its host name cannot be resolved") from error
    texts = dict.fromkeys(str(entry[4][0]).partition("%")[0] for entry in found)
    addresses = [ip_address(text) for text in texts]
    require_allowed(addresses, target.port)
    return addresses


def require_allowed(addresses: Sequence[Address], port: int) -> None:
    """Raise :class:`UnreachableTarget` if one is private, of a metadata service, or our own."""
    for address in addresses:
        if is_denied(address, settings.WEBHOOK_DENIED):
            raise UnreachableTarget(NOT_PUBLIC)
        if is_own(address, port) and not is_denied(address, settings.WEBHOOK_PERMITTED):
            raise UnreachableTarget(OURS)


def is_own(address: Address, port: int) -> bool:
    """Whether the machine itself has the address.

    Connecting a datagram socket sends nothing, but chooses the source address (connect(2)): to
    reach one of its own, the machine uses that.
    """
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((str(address), port))
            return ip_address(probe.getsockname()[0].partition("%")[0]) == address
    except OSError:
        # It cannot be reached at all.
        return False
