"""Forget the tracked connections of one address, so that its next owner inherits none.

Speaks ctnetlink (linux/netfilter/nfnetlink_conntrack.h) because conntrack(8) may not be installed.
The entries are listed and deleted one by one: newer kernels accept a delete request with a
filter, but Debian 12's (6.1) interprets the filter as half of a tuple and refuses it.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from ipaddress import IPv4Address

from hostruntime.host.patience import scaled

_NETLINK_NETFILTER = 12
_SUBSYSTEM = 1 << 8  # NFNL_SUBSYS_CTNETLINK
_GET, _DELETE = _SUBSYSTEM | 1, _SUBSYSTEM | 2
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_DUMP = 0x1, 0x4, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_RESPONSE_SECONDS = 5.0
_BUFFER = 1 << 16
_HEADER, _GENERIC, _ATTRIBUTE = "=IHHII", "=BBH", "=HH"
_NLA_F_NESTED = 0x8000
_NLA_TYPE = 0x3FFF
_CTA_TUPLE_ORIG, _CTA_TUPLE_IP, _CTA_IP_V4_SRC, _CTA_ID, _CTA_ZONE = 1, 1, 1, 12, 18
_CTA_FILTER, _CTA_FILTER_ORIG_FLAGS, _CTA_FILTER_REPLY_FLAGS = 25, 1, 2
_CTA_FILTER_F_IP_SRC = 1
# The kernel applies the family and the filter only with a version above 0 (Linux 5.8).
_NFNETLINK_V1 = 1


def forget_connections(address: IPv4Address) -> None:
    """Delete every tracked connection opened from `address`; raises OSError."""
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
    with socket.socket(socket.AF_NETLINK, kind, _NETLINK_NETFILTER) as handle:
        handle.settimeout(scaled(_RESPONSE_SECONDS))
        handle.bind((0, 0))
        for entry in list(_connections_from(handle, address)):
            _delete(handle, entry)


def _connections_from(handle: socket.socket, address: IPv4Address) -> Iterator[dict[int, bytes]]:
    """Yield the attributes of entries whose first packet came from an address."""
    source = _attribute(_CTA_IP_V4_SRC, address.packed)
    tuple_ip = _attribute(_CTA_TUPLE_IP | _NLA_F_NESTED, source)
    flags = _attribute(_CTA_FILTER_ORIG_FLAGS, struct.pack("=I", _CTA_FILTER_F_IP_SRC))
    flags += _attribute(_CTA_FILTER_REPLY_FLAGS, struct.pack("=I", 0))
    body = _attribute(_CTA_TUPLE_ORIG | _NLA_F_NESTED, tuple_ip)
    body += _attribute(_CTA_FILTER | _NLA_F_NESTED, flags)
    _send(handle, _GET, _NLM_F_DUMP, _NFNETLINK_V1, body)
    for entry in _dump(handle):
        # Check again: whatever the kernel makes of the filter, keep the connections of others.
        original = dict(_attributes(entry[_CTA_TUPLE_ORIG]))
        if dict(_attributes(original[_CTA_TUPLE_IP])).get(_CTA_IP_V4_SRC) == address.packed:
            yield entry


def _dump(handle: socket.socket) -> Iterator[dict[int, bytes]]:
    while True:
        for kind, payload in _messages(handle.recv(_BUFFER)):
            if kind == _NLMSG_DONE:
                return
            if kind == _NLMSG_ERROR:
                _raise_on_error(payload)
            elif kind == _SUBSYSTEM:
                yield dict(_attributes(payload[struct.calcsize(_GENERIC) :]))


def _delete(handle: socket.socket, entry: dict[int, bytes]) -> None:
    # Include the id: a connection with the same ports may have been opened since.
    body = _attribute(_CTA_TUPLE_ORIG | _NLA_F_NESTED, entry[_CTA_TUPLE_ORIG])
    body += b"".join(_attribute(k, entry[k]) for k in (_CTA_ID, _CTA_ZONE) if k in entry)
    _send(handle, _DELETE, _NLM_F_ACK, 0, body)
    for _, payload in _messages(handle.recv(_BUFFER)):
        _raise_on_error(payload)


def _send(handle: socket.socket, kind: int, flags: int, version: int, attributes: bytes) -> None:
    body = struct.pack(_GENERIC, socket.AF_INET, version, 0) + attributes
    length = struct.calcsize(_HEADER) + len(body)
    handle.send(struct.pack(_HEADER, length, kind, _NLM_F_REQUEST | flags, 1, 0) + body)


def _attribute(kind: int, payload: bytes) -> bytes:
    length = struct.calcsize(_ATTRIBUTE) + len(payload)
    return struct.pack(_ATTRIBUTE, length, kind) + payload + bytes(-length % 4)


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the type and payload of each message in a datagram (netlink(7))."""
    while data:
        length, kind, *_ = struct.unpack_from(_HEADER, data)
        yield kind, data[struct.calcsize(_HEADER) : length]
        data = data[length + -length % 4 :]


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while data:
        length, kind = struct.unpack_from(_ATTRIBUTE, data)
        yield kind & _NLA_TYPE, data[struct.calcsize(_ATTRIBUTE) : length]
        data = data[length + -length % 4 :]


def _raise_on_error(payload: bytes) -> None:
    code = -struct.unpack_from("=i", payload)[0]
    # A connection that ended meanwhile is already forgotten.
    if code not in {0, errno.ENOENT}:
        raise OSError(code, f"conntrack: {os.strerror(code)}")
