"""Listening on sockets that several processes share, so that each gets its part of the clients.

All of them are told of a new connection, and the quickest has it. A client keeps its connection for
many calls, so a process that already has more of them than another leaves it to the other first.
"""

from __future__ import annotations

import socket
from typing import Any

from twisted.internet import main, tcp

from hostruntime.host.patience import scaled
from orkestr_console.http.processes import Load

# How long the others have to take a connection; on a busy machine they are woken later.
HEAD_START_SECONDS = scaled(0.002)


class CountedTransport(tcp.Server):
    """An accepted connection."""

    # At most so much is sent in one system call: a whole piece of a stream.
    SEND_LIMIT = 256 * 1024
    # With more unsent, whoever sends has to wait. Twisted goes by bufferSize, which is also how
    # much it reads at once.
    unsent_bytes = 64 * 1024

    def __init__(self, sock: Any, protocol: Any, client: Any, server: Any, *rest: Any) -> None:
        super().__init__(sock, protocol, client, server, *rest)
        self._count = server.count
        self._count(1)

    def _isSendBufferFull(self) -> bool:  # noqa: N802 - Twisted's name
        return len(self.dataBuffer) + self._tempDataLen > self.unsent_bytes

    def doRead(self) -> Any:  # noqa: N802 - Twisted's name
        """There is something to read, or the client has gone.

        Both, if it sends a request and resets the connection at once.  The event loop says so only
        once: libuv stops watching what has an error (POLLERR in uv__poll_io), read or not.
        """
        ended = super().doRead()
        if ended is None and self.connected:
            error = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            return main.CONNECTION_LOST if error else None
        return ended

    def connectionLost(self, reason: Any) -> None:  # noqa: N802 - Twisted's name
        """The connection has ended."""
        self._count(-1)
        super().connectionLost(reason)


class SharedPort(tcp.Port):
    """A listening socket that this process shares with others."""

    transport = CountedTransport  # type: ignore[assignment]

    def share(self, load: Load, index: int) -> None:
        """Count as process ``index`` of ``load``."""
        self._load, self._index = load, index
        self._waited = False

    def count(self, number: int) -> None:
        """There are so many connections more."""
        self._load.add(self._index, number)

    def startListening(self) -> None:  # noqa: N802 - Twisted's name
        """Begin to accept connections."""
        super().startListening()
        self.numberAccepts = 1

    def doRead(self) -> None:  # noqa: N802 - Twisted's name
        """A client wants to connect: accept it, at once or after the others had their chance."""
        if self._waited or not self._load.is_ahead(self._index):
            self._waited = False
            super().doRead()  # type: ignore[no-untyped-call]
            # One at a time: the next is compared anew.
            self.numberAccepts = 1
            return
        self._waited = True
        self.stopReading()  # type: ignore[no-untyped-call]
        self.reactor.callLater(HEAD_START_SECONDS, self._resume)

    def _resume(self) -> None:
        if self.connected and not self.disconnecting:
            self.startReading()  # type: ignore[no-untyped-call]
