"""The agent's responses: errors as JSON, and NDJSON streams that stop when the client leaves."""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from hostruntime.errors import HostError, HostFault, HostFull, HostUnavailable
from hostruntime.wire.message import Message, encode

KEEP_ALIVE_SECONDS = 10.0
HOLD_SECONDS = 0.005
_MAX_PENDING_BYTES = 256 * 1024
NDJSON = "application/x-ndjson"
_log = logging.getLogger(__name__)


def respond(
    message: Message, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A response with one message."""
    return Response(encode(message), status, headers, "application/json")


def no_content() -> Response:
    """An empty success response."""
    return Response(status_code=204)


def ndjson_line(message: Message) -> bytes:
    """A message as one line of a stream; fields with their default are left out."""
    return encode(message, brief=True) + b"\n"


class NdjsonResponse(Response):
    """A stream of lines.

    The lines of the first milliseconds are sent together: for most commands, that is all of them.
    An empty line is sent after ten seconds of silence.  When the client disconnects, the generator
    is closed immediately, and its ``finally`` blocks are awaited.
    """

    def __init__(self, lines: AsyncGenerator[bytes, None]) -> None:
        super().__init__(media_type=NDJSON)
        # The length is unknown: the body is sent in chunks.
        del self.headers["content-length"]
        self._lines = lines
        self._pending = bytearray()
        self._news = asyncio.Event()
        self._taken = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve (ASGI)."""
        async with aclosing(self._lines):
            producing = asyncio.ensure_future(self._produce())
            disconnecting = asyncio.ensure_future(_disconnected(receive))
            tasks = (producing, disconnecting)
            try:
                await asyncio.wait(tasks, timeout=HOLD_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                await self._send_head(send)
                await self._send_lines(send, producing, disconnecting)
            finally:
                for task in tasks:
                    task.cancel()
                results = await asyncio.gather(*tasks, return_exceptions=True)
            if isinstance(results[0], Exception):
                raise results[0]

    async def _produce(self) -> None:
        async for line in self._lines:
            self._pending += line
            self._news.set()
            if len(self._pending) >= _MAX_PENDING_BYTES:
                self._taken.clear()
                await self._taken.wait()

    async def _send_head(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

    async def _send_lines(
        self, send: Send, producing: asyncio.Future[None], disconnecting: asyncio.Future[None]
    ) -> None:
        for task in (producing, disconnecting):
            task.add_done_callback(lambda _: self._news.set())
        while not disconnecting.done():
            self._news.clear()
            body, self._pending = bytes(self._pending), bytearray()
            self._taken.set()
            # Decided before the await, during which it may end.
            ended = producing.done()
            complete = ended and not producing.cancelled() and producing.exception() is None
            if body or complete:
                await send({"type": "http.response.body", "body": body, "more_body": not complete})
            if ended:
                return
            try:
                async with asyncio.timeout(KEEP_ALIVE_SECONDS):
                    await self._news.wait()
            except TimeoutError:
                self._pending += b"\n"


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def host_error(request: Request, error: Exception) -> Response:
    """Respond to a HostError with its own status and text."""
    assert isinstance(error, HostError)
    if isinstance(error, HostFault):
        _log.error("%s %s failed: %s", request.method, request.url.path, error.detail)
    headers = {"Retry-After": "2"} if error.status == HostError.from_wire({}, 503).status else None
    return JSONResponse(error.to_wire(), error.status, headers)


async def disk_error(request: Request, error: Exception) -> Response:
    """Respond that the host's disk is full or read-only; any other OSError is internal."""
    number = error.errno if isinstance(error, OSError) else None
    if number in {errno.ENOSPC, errno.EDQUOT}:
        host_failure: HostError = HostFull("The host's disk is full; try again when it has space.")
    elif number == errno.EROFS:
        host_failure = HostUnavailable(
            "The host's disk is mounted read-only; its operator has to fix it."
        )
    else:
        return await internal_error(request, error)
    _log.error("%s %s failed: %s", request.method, request.url.path, error)
    return await host_error(request, host_failure)


async def client_disconnected(request: Request, _: Exception) -> Response:
    """The client was killed, or gave up, while it sent its body: nobody reads the response."""
    _log.info("%s %s: the client disconnected", request.method, request.url.path)
    return Response(status_code=400)


async def internal_error(request: Request, error: Exception) -> Response:
    """Respond to an unexpected error; the log has the traceback."""
    _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    fault = HostFault("Something went wrong in the host agent; its log has the details.")
    return JSONResponse(fault.to_wire(), fault.status)
