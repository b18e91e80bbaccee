"""Messages between the agent and its own processes: JSON objects with descriptors attached.

A message is a 4-byte big-endian length and that many bytes of JSON, on a Unix stream socket; its
descriptors travel with the first byte (SCM_RIGHTS, unix(7)).
"""

from __future__ import annotations

import array
import json
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from typing import Any

MAX_MESSAGE = 32 * 1024 * 1024
MAX_DESCRIPTORS = 8
_HEADER = struct.Struct("!I")


class ChannelClosed(ConnectionError):  # noqa: N818 - says what happened, as ConnectionReset does
    """The other end has closed the connection."""


def encode(message: Mapping[str, Any]) -> bytes:
    """Encode a message for the wire.  Raises ValueError if it is too large."""
    body = json.dumps(message, separators=(",", ":")).encode()
    if len(body) > MAX_MESSAGE:
        raise ValueError(f"a message of {len(body)} bytes is over the limit of {MAX_MESSAGE}")
    return _HEADER.pack(len(body)) + body


def send(sock: socket.socket, message: Mapping[str, Any], fds: Sequence[int] = ()) -> None:
    """Send a message on a blocking socket.  Raises ChannelClosed."""
    data = encode(message)
    try:
        sent = socket.send_fds(sock, [data], list(fds)) if fds else sock.send(data)
        sock.sendall(data[sent:])
    except (BrokenPipeError, ConnectionResetError) as error:
        raise ChannelClosed("the other end of the channel is gone") from error


def receive(sock: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Receive a message from a blocking socket.

    The caller owns the descriptors (close-on-exec is set).  Raises ChannelClosed, ValueError.
    """
    try:
        header, fds = _receive_header(sock)
    except ConnectionResetError as error:
        # It was killed before it had read everything.
        raise ChannelClosed("the other end of the channel is gone") from error
    try:
        (length,) = _HEADER.unpack(header)
        if length > MAX_MESSAGE:
            raise ChannelClosed(f"the other end announced a message of {length} bytes")
        message = json.loads(_receive_exactly(sock, length))
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return message, fds


def _receive_header(sock: socket.socket) -> tuple[bytes, list[int]]:
    space = socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)
    data, ancillary, _, _ = sock.recvmsg(_HEADER.size, space, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    if not data:
        raise ChannelClosed("the other end of the channel is gone")
    return data + _receive_exactly(sock, _HEADER.size - len(data)), list(fds)


def _receive_exactly(sock: socket.socket, size: int) -> bytes:
    parts: list[bytes] = []
    while size:
        part = sock.recv(min(size, 1 << 20))
        if not part:
            raise ChannelClosed("the other end of the channel is gone")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
