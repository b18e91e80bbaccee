"""Request bodies that pass through as they come, however large they are.

The body of any other request is complete, and in a file, before its view begins. That of an upload
(a ``PUT`` below :data:`PREFIX`) begins its view with the headers: the view reads the body from the
connection, and what it does not take waits in the client's own kernel. So nothing is sent that
would be refused, and no process and no disk of ours ever holds more than a few pieces of it.

Twisted reads the beginning and the end of a large one, and the view what is between them, from the
socket into one buffer (:mod:`orkestr_console.http.straight`).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from django.http import HttpRequest

from hostruntime.host.tasks import receive_into
from orkestr_console.http.straight import copied_socket

PREFIX = "/v1/transfers/"
# More than this is not taken from the connection until the view has read some of it.
MAX_HELD_BYTES = 256 * 1024
# A connection's usual 64 KiB would make four times as many pieces of a large file.
RECEIVE_BYTES = 256 * 1024
# If more than this is to come, it is read from the socket, but for the last.
STRAIGHT_BYTES, LAST_BYTES = 1024 * 1024, 4096
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
# Where the ASGI scope has a request's body, and what ends its connection.
BODY_KEY, CUT_OFF_KEY = "orkestr.upload", "orkestr.cut_off"


def is_upload(method: bytes, path: bytes) -> bool:
    """Whether the request's body is read as it comes."""
    return method == b"PUT" and path.startswith(PREFIX.encode())


class UploadBody:
    """The body of one request, between the connection that it comes from and the view.

    ``channel`` is Twisted's of the connection. With ``expects``, the client sends the body only
    once it is told to continue, which is when the view first reads (RFC 9110, section 10.1.1).
    """

    def __init__(self, channel: Any, *, expects: bool) -> None:
        self._channel = channel
        self._expects = expects
        self._pieces: deque[bytes] = deque()
        self._held = 0
        self._paused = False
        self._news = asyncio.Event()
        # How long the client may send nothing while we wait for it, in seconds.
        self._patience: float | None = channel.timeOut
        self.complete = False
        channel.transport.bufferSize = RECEIVE_BYTES

    # The connection's side ------------------------------------------------------------------

    def feed(self, data: bytes) -> None:
        """A piece has come."""
        self._pieces.append(data)
        self._held += len(data)
        if self._held > MAX_HELD_BYTES:
            self._pause()
        self._news.set()

    def end(self) -> None:
        """All of it has come."""
        self.complete = True
        # What Twisted sets once it is answered; it found none if the last piece was too much.
        self._channel._savedTimeOut = self._patience
        self._news.set()

    # The view's side ------------------------------------------------------------------------

    async def pieces(self) -> AsyncGenerator[bytes | memoryview]:
        """The pieces, each valid until the next is asked for.

        If the client leaves before the last, whoever waits for it is cancelled.
        """
        if self._expects and not self.complete:
            self._expects = False
            self._channel.transport.write(CONTINUE)
        while True:
            while self._pieces:
                piece = self._pieces.popleft()
                self._held -= len(piece)
                yield piece
            if not self.complete and self._decoder.contentLength > STRAIGHT_BYTES:
                async with aclosing(self._straight()) as straight:
                    async for view in straight:
                        yield view
            self._resume()
            if self.complete:
                return
            self._news.clear()
            await self._news.wait()

    async def _straight(self) -> AsyncGenerator[memoryview]:
        """What is to come but for its last bytes, or the end of the connection."""
        decoder = self._decoder
        self._pause()
        try:
            with copied_socket(self._channel.transport) as sock:
                buffer = memoryview(bytearray(RECEIVE_BYTES))
                while (most := decoder.contentLength - LAST_BYTES) > 0:
                    count = await receive_into(sock, buffer[:most], self._patience)
                    if not count:
                        return
                    decoder.contentLength -= count
                    yield buffer[:count]
        except TimeoutError:
            self._channel.forceAbortClient()
        except OSError:
            # Twisted will learn of it as well, and ends the request.
            return
        finally:
            self._resume()

    @property
    def _decoder(self) -> Any:
        """What knows how many bytes of the body Twisted has still to read (``contentLength``)."""
        return self._channel._transferDecoder

    def _pause(self) -> None:
        """Have Twisted read no more for now."""
        if not self._paused:
            self._paused = True
            # Until the view goes on, it is not the client that is idle.
            self._channel.setTimeout(None)
            self._channel.transport.pauseProducing()

    def _resume(self) -> None:
        if self._paused:
            self._paused = False
            if not self.complete:
                self._channel.setTimeout(self._patience)
            self._channel.transport.resumeProducing()


async def request_body(request: HttpRequest) -> AsyncGenerator[bytes | memoryview]:
    """The body of an upload's request, which is complete already unless our server has it.

    Each piece is valid until the next is asked for.
    """
    body = scope_of(request).get(BODY_KEY)
    if body is None:
        yield request.body
        return
    async with aclosing(body.pieces()) as pieces:
        async for piece in pieces:
            yield piece


def cut_off(request: HttpRequest) -> None:
    """End the connection: the client must not take what it has for the whole response."""
    if CUT_OFF_KEY in (scope := scope_of(request)):
        scope[CUT_OFF_KEY]()


def scope_of(request: HttpRequest) -> dict[str, Any]:
    """The request's ASGI scope; an empty one if it did not come through a server."""
    scope: dict[str, Any] = getattr(request, "scope", {})
    return scope
