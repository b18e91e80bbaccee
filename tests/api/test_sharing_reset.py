"""A client that resets its connection together with its request (SO_LINGER in socket(7))."""

from __future__ import annotations

import socket
import struct
from typing import Any

from twisted.internet import main

from orkestr_console.http.sharing import CountedTransport


class Received:
    """A protocol that keeps what it is given."""

    def __init__(self) -> None:
        self.data = b""

    def dataReceived(self, data: bytes) -> None:  # noqa: N802 - Twisted's name
        self.data += data


def test_a_reset_that_comes_with_data_is_noticed_when_that_is_read() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        client.sendall(b"a request")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        accepted, _ = server.accept()
    with accepted:
        accepted.setblocking(False)  # noqa: FBT003 - positional-only
        transport: Any = CountedTransport.__new__(CountedTransport)
        transport.socket, transport.connected = accepted, True
        transport.protocol = received = Received()
        assert transport.doRead() is main.CONNECTION_LOST
        assert received.data == b"a request"
