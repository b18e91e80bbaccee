"""Reading and deleting the elements of an nftables set over netlink, without nft(8).

What programs tried is read after each command that failed, so it has to be cheap; and nft doesn't
print times more precisely than in seconds. To delete what was read, nft would first read the set
itself, and its one process would do nothing else meanwhile, however much a tenant has tried.

The messages are those of linux/netfilter/nf_tables.h; a set's elements come in as many as are
needed (netlink(7), multipart), and a change is a message between two that begin and end a
transaction (linux/netfilter/nfnetlink.h).
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hostruntime.host.patience import scaled

_RESPONSE_SECONDS = 5.0
_BUFFER = 1 << 16
_NETLINK_NETFILTER = 12
_HEADER, _FAMILY, _ATTRIBUTE = struct.Struct("=IHHII"), struct.Struct("=BBH"), struct.Struct("=HH")
_NFNL_SUBSYS_NFTABLES = 10
_NFT_MSG_GETSETELEM = (_NFNL_SUBSYS_NFTABLES << 8) | 13
_NFT_MSG_DELSETELEM = (_NFNL_SUBSYS_NFTABLES << 8) | 14
_NFNL_MSG_BATCH_BEGIN, _NFNL_MSG_BATCH_END = 16, 17
_NFPROTO = {"inet": 1, "ip": 2}
# A message of no family, whose resource is the subsystem, in network byte order.
_BATCH = struct.pack("!BBH", 0, 0, _NFNL_SUBSYS_NFTABLES)
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_DUMP, _NLM_F_DUMP_INTR = 0x1, 0x4, 0x300, 0x10
# Without NLA_F_NESTED and NLA_F_NET_BYTEORDER.
_TYPE_MASK, _NESTED = 0x3FFF, 0x8000
_LIST_ITEM = 1
_LIST_TABLE, _LIST_SET, _LIST_ELEMENTS = 1, 2, 3
_ELEMENT_KEY, _ELEMENT_EXPIRATION, _DATA_VALUE = 1, 5, 1
# A change meanwhile interrupts a listing, which is then repeated.
_TRIES = 3
# How many are deleted at once. The list of them is one attribute, whose length has 16 bits.
_MOST_AT_ONCE = 1024


@dataclass(frozen=True)
class Element:
    """One element: its ``key``, and in how many milliseconds it expires, None if never.

    The parts of a concatenated key are padded to four bytes each.
    """

    key: bytes
    expires_ms: int | None


def list_elements(family: str, table: str, name: str) -> list[Element]:
    """List a set in the calling thread's network namespace.  Raises OSError."""
    attributes = _text(_LIST_TABLE, table) + _text(_LIST_SET, name)
    body = _FAMILY.pack(_NFPROTO[family], 0, 0) + attributes
    flags = _NLM_F_REQUEST | _NLM_F_DUMP
    request = _message(_NFT_MSG_GETSETELEM, flags, body)
    elements: list[Element] = []
    for _ in range(_TRIES):
        elements, complete = _ask(request)
        if complete:
            break
    # The kernel may list one twice while the set grows (rhashtable_walk_next).
    return list({element.key: element for element in elements}.values())


def delete_elements(family: str, table: str, name: str, keys: Sequence[bytes]) -> None:
    """Delete from a set in the calling thread's network namespace.

    Some at a time, and of those all or none.  Raises OSError; FileNotFoundError once all have been
    tried, if of some one wasn't there any more.
    """
    gone: FileNotFoundError | None = None
    # A second time, one isn't there any more.
    unique = list(dict.fromkeys(keys))
    for start in range(0, len(unique), _MOST_AT_ONCE):
        try:
            _ask(_deletion(family, table, name, unique[start : start + _MOST_AT_ONCE]))
        except FileNotFoundError as error:
            gone = error
    if gone is not None:
        raise gone


def _deletion(family: str, table: str, name: str, keys: Sequence[bytes]) -> bytes:
    """A transaction; the kernel answers its one change (NLM_F_ACK)."""
    items = b"".join(
        _nest(_LIST_ITEM, _nest(_ELEMENT_KEY, _attribute(_DATA_VALUE, key))) for key in keys
    )
    where = _text(_LIST_TABLE, table) + _text(_LIST_SET, name)
    body = _FAMILY.pack(_NFPROTO[family], 0, 0) + where + _nest(_LIST_ELEMENTS, items)
    return b"".join(
        [
            _message(_NFNL_MSG_BATCH_BEGIN, _NLM_F_REQUEST, _BATCH),
            _message(_NFT_MSG_DELSETELEM, _NLM_F_REQUEST | _NLM_F_ACK, body),
            _message(_NFNL_MSG_BATCH_END, _NLM_F_REQUEST, _BATCH),
        ]
    )


def _message(kind: int, flags: int, body: bytes) -> bytes:
    return _HEADER.pack(_HEADER.size + len(body), kind, flags, 1, 0) + body


def _ask(request: bytes) -> tuple[list[Element], bool]:
    """The elements, and whether the set didn't change meanwhile."""
    found: list[Element] = []
    complete = True
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
    with socket.socket(socket.AF_NETLINK, kind, _NETLINK_NETFILTER) as handle:
        handle.settimeout(scaled(_RESPONSE_SECONDS))
        handle.send(request)
        while True:
            for message, flags, payload in _messages(handle.recv(_BUFFER)):
                complete = complete and not flags & _NLM_F_DUMP_INTR
                if message in {_NLMSG_ERROR, _NLMSG_DONE}:
                    code = -struct.unpack_from("=i", payload)[0] if len(payload) >= 4 else 0
                    if code:
                        raise OSError(code, f"nftables: {os.strerror(code)}")
                    return found, complete
                found += _elements(payload[_FAMILY.size :])


def _messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, flags, *_ = _HEADER.unpack_from(data, at)
        yield kind, flags, data[at + _HEADER.size : at + length]
        at += max(_HEADER.size, length + -length % 4)


def _elements(data: bytes) -> Iterator[Element]:
    for kind, listed in _attributes(data):
        if kind != _LIST_ELEMENTS:
            continue
        for _, item in _attributes(listed):
            parts = dict(_attributes(item))
            key = dict(_attributes(parts.get(_ELEMENT_KEY, b""))).get(_DATA_VALUE, b"")
            expiration = parts.get(_ELEMENT_EXPIRATION)
            yield Element(key, None if expiration is None else int.from_bytes(expiration, "big"))


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        yield kind & _TYPE_MASK, data[at + _ATTRIBUTE.size : at + length]
        at += max(_ATTRIBUTE.size, length + -length % 4)


def _text(kind: int, text: str) -> bytes:
    return _attribute(kind, text.encode() + b"\0")


def _nest(kind: int, payload: bytes) -> bytes:
    return _attribute(kind | _NESTED, payload)


def _attribute(kind: int, payload: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(payload)
    return _ATTRIBUTE.pack(length, kind) + payload + bytes(-length % 4)
