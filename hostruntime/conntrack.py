"""Forget the tracked connections of one address, so that its next holder inherits none.

Speaks ctnetlink (linux/netfilter/nfnetlink_conntrack.h) because conntrack(8) need not be
installed: one delete request with a filter on the original source address.
"""

from __future__ import annotations

import os
import socket
import struct
from ipaddress import IPv4Address

from hostruntime.patience import scaled

_NETLINK_NETFILTER = 12
_IPCTNL_MSG_CT_DELETE = (1 << 8) | 2  # NFNL_SUBSYS_CTNETLINK
_NLM_F_REQUEST_ACK = 0x1 | 0x4
_NLMSG_ERROR = 2
_ANSWER_SECONDS = 5.0
_NLA_F_NESTED = 0x8000
_CTA_TUPLE_ORIG, _CTA_TUPLE_IP, _CTA_IP_V4_SRC = 1, 1, 1
_CTA_FILTER, _CTA_FILTER_ORIG_FLAGS, _CTA_FILTER_REPLY_FLAGS = 25, 1, 2
_CTA_FILTER_F_IP_SRC = 1
# A version above 0 is what makes the kernel heed the family and the filter (Linux 5.8).
_NFNETLINK_V1 = 1


def forget_connections(address: IPv4Address) -> None:
    """Delete every tracked connection that `address` began; raises OSError."""
    source = _attribute(_CTA_IP_V4_SRC, address.packed)
    tuple_ip = _attribute(_CTA_TUPLE_IP | _NLA_F_NESTED, source)
    flags = _attribute(_CTA_FILTER_ORIG_FLAGS, struct.pack("=I", _CTA_FILTER_F_IP_SRC))
    flags += _attribute(_CTA_FILTER_REPLY_FLAGS, struct.pack("=I", 0))
    body = struct.pack("=BBH", socket.AF_INET, _NFNETLINK_V1, 0)
    body += _attribute(_CTA_TUPLE_ORIG | _NLA_F_NESTED, tuple_ip)
    body += _attribute(_CTA_FILTER | _NLA_F_NESTED, flags)
    header = struct.pack("=IHHII", 16 + len(body), _IPCTNL_MSG_CT_DELETE, _NLM_F_REQUEST_ACK, 1, 0)
    _raise_on_error(_ask(header + body))


def _attribute(kind: int, payload: bytes) -> bytes:
    length = 4 + len(payload)
    return struct.pack("=HH", length, kind) + payload + bytes(-length % 4)


def _ask(message: bytes) -> bytes:
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
    with socket.socket(socket.AF_NETLINK, kind, _NETLINK_NETFILTER) as handle:
        handle.settimeout(scaled(_ANSWER_SECONDS))
        handle.bind((0, 0))
        handle.send(message)
        return handle.recv(4096)


def _raise_on_error(answer: bytes) -> None:
    kind = struct.unpack_from("=H", answer, 4)[0]
    code = -struct.unpack_from("=i", answer, 16)[0]
    if kind == _NLMSG_ERROR and code:
        raise OSError(code, f"conntrack delete: {os.strerror(code)}")
