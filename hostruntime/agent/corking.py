"""Sending what belongs together in one piece.

uvicorn writes a response's head and each part of its body to the socket as it gets them.  Each
write is a system call and wakes the reader, who then finds half a response.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HELD_BYTES = 64 * 1024


class CorkedTransport:
    """A transport that holds what is written until the event loop's next iteration.

    At most :data:`MAX_HELD_BYTES` are held, so that a full socket still slows the writer down.
    Everything else is the transport's own.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._held = bytearray()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write, soon; what is large enough on its own, at once and without copying it."""
        if len(data) >= MAX_HELD_BYTES:
            self._flush()
            self._transport.write(data)
            return
        if not self._held:
            self._loop.call_soon(self._flush)
        self._held += data
        if len(self._held) >= MAX_HELD_BYTES:
            self._flush()

    def close(self) -> None:
        """Close the connection once everything has been sent."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._held:
            held, self._held = self._held, bytearray()
            self._transport.write(held)


class CorkedProtocol(HttpToolsProtocol):
    """uvicorn's protocol over such a transport."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Serve a new connection."""
        super().connection_made(cast("asyncio.Transport", CorkedTransport(transport, self.loop)))
