"""The client of the host agent inside an event loop, for commands: their output as it comes.

Each call of a command goes through here, and httpx, which the synchronous client has, takes five
times as long over a request as aiohttp does.  :func:`async_host_client` keeps one client, with its
connections, for each event loop and socket.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Self, cast

import aiohttp

from hostruntime.client.transport import ExecCollector, no_answer, parse, parse_error, unreachable
from hostruntime.host.patience import scaled
from hostruntime.wire.commands import Exec, ExecFrame, ExecResult
from hostruntime.wire.message import encode

DEFAULT_MAX_OUTPUT_BYTES = 16 * 1024 * 1024
# A stream sends something at least every 10 s (a blank line), so silence means a dead agent.
_CONNECT_SECONDS, _SILENCE_SECONDS = 5.0, 30.0
# Less than the agent's own (agent.__main__), so that it never closes one that is about to be used.
_KEEP_ALIVE_SECONDS = 60.0
# The longest line is a chunk of 64 KiB in base64; aiohttp refuses one of twice this.
_LINE_BYTES = 1024 * 1024


class AsyncHostClient:
    """The agent from inside an event loop, for streams.  Raises the same as HostClient."""

    def __init__(self, socket: Path | str) -> None:
        self.socket = Path(socket)
        self._http = aiohttp.ClientSession(
            "http://host",
            # As many as are asked for: the callers have limits of their own, and a command uses a
            # connection for as long as it runs.
            connector=aiohttp.UnixConnector(
                str(socket), limit=0, keepalive_timeout=_KEEP_ALIVE_SECONDS
            ),
            timeout=aiohttp.ClientTimeout(
                total=None,
                sock_connect=scaled(_CONNECT_SECONDS),
                sock_read=scaled(_SILENCE_SECONDS),
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            read_bufsize=_LINE_BYTES,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.close()

    async def exec_frames(self, sandbox_id: str, request: Exec) -> AsyncIterator[ExecFrame]:
        """Run a command, yielding its frames; close the iterator early to kill it.

        A frame of kind ``error`` or ``exited`` is the last.  Raises only errors from before the
        command started; TooManyCommands if it would exceed its quota.
        """
        path = f"/sandboxes/{sandbox_id}/exec"
        async with self._post(path, encode(request)) as response:
            async for line in response.content:
                if line.strip():
                    yield parse(ExecFrame, line)

    async def exec_to_completion(self, sandbox_id: str, request: Exec) -> ExecResult:
        """Run a command and wait for it; cancelling kills the command.

        Only the first 16 MiB of output are retained unless the request says otherwise; more is
        discarded and ``truncated`` is set.  Raises ExecTimeout (its ``extra`` holds the ``stdout``
        and ``stderr`` so far, as bytes), CwdNotFound, NotFound, ContainerGone, and TooManyCommands
        if it would exceed its quota.
        """
        collected, frames = (
            ExecCollector(),
            self.exec_frames(sandbox_id, with_output_limit(request)),
        )
        # An async generator, whatever its annotation says: closing it kills the command.
        async with aclosing(cast("AsyncGenerator[ExecFrame]", frames)) as stream:
            async for frame in stream:
                collected.add(frame)
        return collected.result()

    @asynccontextmanager
    async def _post(self, path: str, body: bytes) -> AsyncIterator[aiohttp.ClientResponse]:
        headers = {"Content-Type": "application/json"}
        with _transport_errors(self.socket):
            # Left before its end, the response closes the connection, and that kills the command.
            async with self._http.post(path, data=body, headers=headers) as response:
                if not response.ok:
                    raise parse_error(response.status, await response.read())
                yield response


def with_output_limit(request: Exec) -> Exec:
    """Add the default limit of output, which is collected in memory."""
    if request.max_output_bytes is not None:
        return request
    return replace(request, max_output_bytes=DEFAULT_MAX_OUTPUT_BYTES)


@contextmanager
def _transport_errors(socket: Path) -> Iterator[None]:
    """Convert transport failures to HostUnavailable."""
    try:
        yield
    except aiohttp.ServerTimeoutError as error:
        raise no_answer(socket) from error
    except aiohttp.ClientError as error:
        raise unreachable(socket, error) from error


_clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, AsyncHostClient]] = (
    weakref.WeakKeyDictionary()
)


def async_host_client(socket: Path | str) -> AsyncHostClient:
    """The running event loop's client for this socket."""
    loop_clients = _clients.setdefault(asyncio.get_running_loop(), {})
    key = str(socket)
    if key not in loop_clients:
        loop_clients[key] = AsyncHostClient(socket)
    return loop_clients[key]
