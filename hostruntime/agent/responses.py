"""The agent's responses: errors as JSON, and NDJSON streams that stop when the client leaves."""

from __future__ import annotations

import asyncio
import contextlib
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

    An empty line is sent after ten seconds of silence.  When the client disconnects, the generator
    is closed immediately, and its ``finally`` blocks are awaited.
    """

    def __init__(self, lines: AsyncGenerator[bytes, None]) -> None:
        super().__init__(media_type=NDJSON)
        # The length is unknown: the body is sent in chunks.
        del self.headers["content-length"]
        self._lines = lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve (ASGI)."""
        head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        async with aclosing(self._lines):
            await send(head)
            sending = asyncio.ensure_future(self._send_lines(send))
            disconnecting = asyncio.ensure_future(_disconnected(receive))
            try:
                await asyncio.wait([sending, disconnecting], return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (sending, disconnecting):
                    task.cancel()
                results = await asyncio.gather(sending, disconnecting, return_exceptions=True)
            if isinstance(results[0], Exception):
                raise results[0]

    async def _send_lines(self, send: Send) -> None:
        upcoming: asyncio.Future[bytes] | None = None
        try:
            while True:
                upcoming = upcoming or asyncio.ensure_future(anext(self._lines))
                done, _ = await asyncio.wait([upcoming], timeout=KEEP_ALIVE_SECONDS)
                body = b"\n"
                if done:
                    try:
                        body = upcoming.result()
                    except StopAsyncIteration:
                        break
                    finally:
                        upcoming = None
                await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            if upcoming is not None:
                upcoming.cancel()
                with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration, HostError):
                    await upcoming


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
