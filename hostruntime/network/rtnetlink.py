"""Interfaces, addresses and routes of the calling thread's network namespace (rtnetlink(7)).

What `ip link`, `ip address` and `ip route` do, without starting a program: a slot's namespace is
created for every container. Each request is acknowledged, and one the kernel refuses raises
OSError.
"""

from __future__ import annotations

import os
import socket
import struct
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from hostruntime.host.patience import scaled

_RESPONSE_SECONDS = 20.0
_BUFFER = 1 << 14
_HEADER, _ATTRIBUTE = struct.Struct("=IHHII"), struct.Struct("=HH")
_NLMSG_ERROR = 2
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_REPLACE = 0x1, 0x4, 0x100
_NLM_F_EXCL, _NLM_F_CREATE = 0x200, 0x400
# linux/rtnetlink.h
_RTM_NEWLINK, _RTM_DELLINK, _RTM_NEWADDR, _RTM_NEWROUTE = 16, 17, 20, 24
_RT_TABLE_MAIN, _RTPROT_BOOT, _RTN_UNICAST, _RTN_UNREACHABLE = 254, 3, 1, 7
_RT_SCOPE_UNIVERSE, _RT_SCOPE_LINK = 0, 253
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PREFSRC = 1, 4, 5, 7
_ROUTE = struct.Struct("=8BI")
# linux/if_link.h, linux/veth.h, linux/if_addr.h
_INTERFACE, _INTERFACE_ADDRESS = struct.Struct("=BxHiII"), struct.Struct("=4BI")
_IFLA_IFNAME, _IFLA_LINKINFO, _IFLA_NET_NS_FD = 3, 18, 28
_IFLA_INFO_KIND, _IFLA_INFO_DATA, _VETH_INFO_PEER = 1, 2, 1
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_IFF_UP = 0x1


class RouteSocket:
    """A connection to the kernel, in the namespace in which it was opened; a context manager."""

    def __init__(self) -> None:
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
        self._handle = socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE)
        self._handle.settimeout(scaled(_RESPONSE_SECONDS))

    def __enter__(self) -> RouteSocket:
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.close()

    def add_veth(self, name: str, peer: str, namespace: Path) -> None:
        """Create a pair of interfaces (veth(4)): `name` here, `peer` in another namespace."""
        with namespace.open("rb") as handle:
            peer_attributes = _text(_IFLA_IFNAME, peer)
            peer_attributes += _attribute(_IFLA_NET_NS_FD, struct.pack("=I", handle.fileno()))
            peer_message = _INTERFACE.pack(0, 0, 0, 0, 0) + peer_attributes
            data = _attribute(_IFLA_INFO_DATA, _attribute(_VETH_INFO_PEER, peer_message))
            info = _attribute(_IFLA_LINKINFO, _text(_IFLA_INFO_KIND, "veth") + data)
            body = _INTERFACE.pack(0, 0, 0, 0, 0) + _text(_IFLA_IFNAME, name) + info
            self._request(_RTM_NEWLINK, _NLM_F_CREATE | _NLM_F_EXCL, body)

    def set_up(self, name: str) -> None:
        """Bring an interface up."""
        self._request(_RTM_NEWLINK, 0, _INTERFACE.pack(0, 0, _index(name), _IFF_UP, _IFF_UP))

    def set_down(self, name: str) -> None:
        """Take an interface down: nothing passes it or its peer, and its routes are gone."""
        self._request(_RTM_NEWLINK, 0, _INTERFACE.pack(0, 0, _index(name), 0, _IFF_UP))

    def delete_link(self, name: str) -> None:
        """Delete an interface, and its peer.

        Returns once none of its packets is in flight, so that its address can be used again.
        """
        self._request(_RTM_DELLINK, 0, _INTERFACE.pack(0, 0, _index(name), 0, 0))

    def add_address(self, name: str, address: IPv4Address) -> None:
        """Give an interface an address of its own, without a network."""
        message = _INTERFACE_ADDRESS.pack(
            socket.AF_INET, address.max_prefixlen, 0, _RT_SCOPE_UNIVERSE, _index(name)
        )
        for kind in (_IFA_LOCAL, _IFA_ADDRESS):
            message += _attribute(kind, address.packed)
        self._request(_RTM_NEWADDR, _NLM_F_CREATE | _NLM_F_EXCL, message)

    def replace_route(
        self,
        destination: IPv4Network,
        name: str,
        *,
        gateway: IPv4Address | None = None,
        source: IPv4Address | None = None,
    ) -> None:
        """Route a network through an interface, instead of any other way."""
        attributes = _attribute(_RTA_OIF, struct.pack("=I", _index(name)))
        for kind, address in ((_RTA_GATEWAY, gateway), (_RTA_PREFSRC, source)):
            if address is not None:
                attributes += _attribute(kind, address.packed)
        scope = _RT_SCOPE_LINK if gateway is None else _RT_SCOPE_UNIVERSE
        self._replace_route(destination, _RTN_UNICAST, scope, attributes)

    def replace_unreachable(self, destination: IPv4Network) -> None:
        """Refuse packets to a network, like `ip route replace unreachable` (ip-route(8))."""
        self._replace_route(destination, _RTN_UNREACHABLE, _RT_SCOPE_UNIVERSE, b"")

    def _replace_route(
        self, destination: IPv4Network, kind: int, scope: int, attributes: bytes
    ) -> None:
        prefix, table = destination.prefixlen, _RT_TABLE_MAIN
        message = _ROUTE.pack(socket.AF_INET, prefix, 0, 0, table, _RTPROT_BOOT, scope, kind, 0)
        if prefix:
            message += _attribute(_RTA_DST, destination.network_address.packed)
        self._request(_RTM_NEWROUTE, _NLM_F_CREATE | _NLM_F_REPLACE, message + attributes)

    def _request(self, kind: int, flags: int, body: bytes) -> None:
        """Send a message and wait until the kernel has acted on it.  Raises OSError."""
        flags |= _NLM_F_REQUEST | _NLM_F_ACK
        self._handle.send(_HEADER.pack(_HEADER.size + len(body), kind, flags, 1, 0) + body)
        answer = self._handle.recv(_BUFFER)
        if _HEADER.unpack_from(answer)[1] == _NLMSG_ERROR:
            code = -struct.unpack_from("=i", answer, _HEADER.size)[0]
            if code:
                raise OSError(code, f"rtnetlink: {os.strerror(code)}")


def _index(name: str) -> int:
    """An interface's number in the calling thread's namespace.  Raises OSError."""
    return socket.if_nametoindex(name)


def _attribute(kind: int, payload: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(payload)
    return _ATTRIBUTE.pack(length, kind) + payload + bytes(-length % 4)


def _text(kind: int, text: str) -> bytes:
    return _attribute(kind, text.encode() + b"\0")
