"""One socket and its side of HTTP/1.1 (RFC 9112), parsed and written by h11.

Nothing is read before somebody wants it, and nothing written is buffered here: a piece is sent
before the next is read, so that whoever is slow makes the other wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import struct
from collections.abc import Iterable

import h11

from hostruntime.host.tasks import readable

PIECE_BYTES = 64 * 1024
MAX_HEAD_BYTES = 32 * 1024
# Enough of what is still on its way to be read before a connection is closed, so that the response
# is not lost with it (RFC 9112, 9.6).
LINGER_SECONDS = 2.0
LINGER_BYTES = 1024 * 1024
# How often is asked whether a visitor has left who has sent more than was read.
GONE_POLL_SECONDS = 5.0

type Headers = list[tuple[bytes, bytes]]


class HeadTooLarge(Exception):  # noqa: N818 - what it is
    """A head is larger than ``MAX_HEAD_BYTES``."""


class Wire:
    """A non-blocking socket, and the state of its HTTP; it owns the socket."""

    def __init__(self, sock: socket.socket, role: type[h11.CLIENT] | type[h11.SERVER]) -> None:
        self.sock = sock
        self.http = h11.Connection(role, MAX_HEAD_BYTES)
        self._loop = asyncio.get_running_loop()

    async def receive(self) -> h11.Event:
        """The next event. Raises ``h11.RemoteProtocolError``, ``OSError``, ``HeadTooLarge``.

        ``h11.ConnectionClosed`` also where h11 is told to wait: callers never ask then.
        """
        while True:
            event = self.http.next_event()
            if event is h11.NEED_DATA:
                self.http.receive_data(await self.receive_raw())
                continue
            if isinstance(event, h11.Request | h11.Response):
                require_small(event.headers)
            assert not isinstance(event, type), event
            if isinstance(event, h11.Data | h11.InformationalResponse):
                # One read may have brought thousands, and passing one on seldom waits.
                await asyncio.sleep(0)
            return event

    async def send(self, event: h11.Event) -> None:
        """Send an event. Raises ``OSError``, ``h11.LocalProtocolError``."""
        data = self.http.send(event)
        if data:
            await self._loop.sock_sendall(self.sock, data)

    async def send_raw(self, data: bytes) -> None:
        """Send bytes after the end of HTTP. Raises ``OSError``."""
        await self._loop.sock_sendall(self.sock, data)

    async def receive_raw(self) -> bytes:
        """Bytes as they come, none at the end. Raises ``OSError``."""
        # Where both sides are quick nothing else here waits, and all other visitors would.
        await asyncio.sleep(0)
        return await self._loop.sock_recv(self.sock, PIECE_BYTES)

    async def left(self) -> None:
        """Return when the other side has closed the connection; reads nothing."""
        while True:
            await readable(self.sock.fileno())
            try:
                if not self.sock.recv(1, socket.MSG_PEEK):
                    return
            except BlockingIOError:
                continue
            except OSError:
                return
            # More was sent, which is not read yet: the end is behind it.
            poller = select.poll()
            poller.register(self.sock, select.POLLRDHUP)
            while not poller.poll(0):
                await asyncio.sleep(GONE_POLL_SECONDS)
            return

    async def close_gently(self) -> None:
        """Close it so that what was sent arrives, though more may come that nobody reads."""
        with contextlib.suppress(OSError, TimeoutError):
            self.sock.shutdown(socket.SHUT_WR)
            async with asyncio.timeout(LINGER_SECONDS):
                rest = LINGER_BYTES
                while rest > 0 and (data := await self.receive_raw()):
                    rest -= len(data)
        self.sock.close()

    def abort(self) -> None:
        """Close it so that the other side takes nothing for whole (SO_LINGER, socket(7))."""
        with contextlib.suppress(OSError):
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def close(self) -> None:
        """Close it."""
        self.sock.close()


def require_small(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Raise ``HeadTooLarge``: h11 counts only what it has to wait for."""
    if sum(len(name) + len(value) for name, value in headers) > MAX_HEAD_BYTES:
        raise HeadTooLarge
