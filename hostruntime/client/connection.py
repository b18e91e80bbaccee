"""A connection to the agent inside an event loop: HTTP/1.1 and no more of it than the agent speaks.

A command takes one request and an answer of a few lines, for which a general client works longer
than the agent does.  Parsing is llhttp's (httptools); a request is one write.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import AsyncIterator
from typing import Any, cast

import httptools

# More than this of an answer waits in the kernel until somebody reads it.
BUFFER_BYTES = 1024 * 1024


class ConnectionBroken(ConnectionError):  # noqa: N818 - what it is
    """The agent hung up, or what it sent is no HTTP, before an answer was complete."""


class AgentConnection(asyncio.Protocol):
    """One connection, for one request at a time."""

    def __init__(self) -> None:
        self._silence = 0.0
        self._lost = False
        self._news = asyncio.Event()
        # When it was last free, by the event loop's clock.
        self.idle_since = 0.0
        self._begin()

    def _begin(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._body = bytearray()
        self._held = 0
        self._status = 0
        self.headers: dict[str, str] = {}
        self._complete = self._kept_alive = False
        self._paused = False

    # What the event loop and the parser call ------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is connected."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Something came."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.abort()
            self._lost = True
        self._news.set()

    def connection_lost(self, error: Exception | None) -> None:
        """It is no more."""
        self._lost = True
        self._news.set()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header of the answer."""
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """The status is known."""
        self._status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        """A piece of the answer."""
        self._body += data
        self._held += len(data)
        if self._held > BUFFER_BYTES and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        """The answer is complete."""
        self._complete = True
        # The parser knows it only here.
        self._kept_alive = self._parser.should_keep_alive()

    # What the client calls ------------------------------------------------------------------

    @property
    def is_free(self) -> bool:
        """Whether it can take another request."""
        return not self._lost and self._complete and self._kept_alive

    def was_closed(self) -> bool:
        """Whether the agent has hung up, even if the event loop has not heard of it yet."""
        poller = select.poll()
        poller.register(self._transport.get_extra_info("socket").fileno(), select.POLLIN)
        # There is nothing to read from a free connection but its end.
        return bool(poller.poll(0))

    def close(self) -> None:
        """Hang up, which ends what the agent does for an answer that is not complete."""
        self._transport.abort()
        self._lost = True

    async def send(self, method: str, target: str, body: bytes, silence: float) -> int:
        """Send a request; the answer's status.  Raises ConnectionBroken, TimeoutError.

        ``silence`` is how many seconds the agent may say nothing until the answer is complete.
        """
        self._begin_request(silence)
        self._transport.write(request_head(method, target, len(body)) + body)
        return await self._status_of_answer()

    def _begin_request(self, silence: float) -> None:
        # The end of the answer before may have come while nothing more was read.
        self._resume()
        self._begin()
        self._silence = silence

    async def _status_of_answer(self) -> int:
        while not self._status:
            await self._wait()
        return self._status

    async def lines(self) -> AsyncIterator[bytes]:
        """The lines of the answer as they come.  Raises ConnectionBroken, TimeoutError."""
        while True:
            if b"\n" in self._body:
                *lines, rest = bytes(self._body).split(b"\n")
                self._body, self._held = bytearray(rest), len(rest)
                self._resume()
                for line in lines:
                    yield line
            elif self._complete:
                if self._body:
                    yield bytes(self._body)
                return
            else:
                await self._wait()

    async def read(self) -> bytes:
        """The whole answer.  Raises ConnectionBroken, TimeoutError."""
        while not self._complete:
            await self._wait()
        return bytes(self._body)

    async def _wait(self) -> None:
        """Wait for more."""
        self._news.clear()
        self._resume()
        if self._lost:
            raise ConnectionBroken("it hung up")
        async with asyncio.timeout(self._silence):
            await self._news.wait()

    def _resume(self) -> None:
        if self._paused and not self._lost:
            self._paused = False
            self._transport.resume_reading()


def request_head(method: str, target: str, length: int) -> bytes:
    """A request up to its body."""
    head = f"{method} {target} HTTP/1.1\r\nHost: host\r\nContent-Length: {length}\r\n\r\n"
    return head.encode("ascii")


class AgentConnections:
    """The connections to the agent's socket that are free for the next request."""

    def __init__(self, socket: str, *, connect_seconds: float, idle_seconds: float) -> None:
        self._socket = socket
        self._connect_seconds = connect_seconds
        self._idle_seconds = idle_seconds
        self._free: list[AgentConnection] = []

    async def take(self) -> AgentConnection:
        """The one that was used last, else a new one.  Raises OSError, TimeoutError."""
        loop = asyncio.get_running_loop()
        while self._free:
            connection = self._free.pop()
            is_fresh = loop.time() - connection.idle_since < self._idle_seconds
            if connection.is_free and is_fresh and not connection.was_closed():
                return connection
            connection.close()
        async with asyncio.timeout(self._connect_seconds):
            made: Any = await loop.create_unix_connection(AgentConnection, self._socket)
        return cast("AgentConnection", made[1])

    async def give_back(self, connection: AgentConnection) -> None:
        """Keep it for the next request, or hang up if its answer was left before its end."""
        if connection.is_free:
            connection.idle_since = asyncio.get_running_loop().time()
            self._free.append(connection)
        else:
            connection.close()
            # The event loop closes the socket as soon as it is its turn.
            await asyncio.sleep(0)

    def close(self) -> None:
        """Close those that are free."""
        while self._free:
            self._free.pop().close()
