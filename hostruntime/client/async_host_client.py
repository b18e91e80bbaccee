"""The client of the host agent inside an event loop: commands and files as they come, calls.

What API calls make of the agent goes through here, with connections of its own
(:mod:`hostruntime.client.connection`): httpx, which the synchronous client has, takes many times as
long over a request.  :func:`async_host_client` keeps one client, with its connections, for each
event loop and socket.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

from hostruntime.client import calls
from hostruntime.client.calls import KERNEL_SECONDS, Call
from hostruntime.client.connection import AgentConnection, AgentConnections
from hostruntime.client.transfers import begun
from hostruntime.client.transport import (
    ExecCollector,
    no_answer,
    parse,
    parse_error,
    unreachable,
)
from hostruntime.errors import TooManyCommands
from hostruntime.host.patience import scaled
from hostruntime.wire.background import CommandFrame, FollowCommand
from hostruntime.wire.commands import Exec, ExecFrame, ExecResult
from hostruntime.wire.files import FilePart, WantedPart
from hostruntime.wire.interpreter import CodeFrame, RunCode
from hostruntime.wire.message import encode
from hostruntime.wire.transfers import OpenTransfer

DEFAULT_MAX_OUTPUT_BYTES = 16 * 1024 * 1024
# A stream sends something at least every 10 s (a blank line), so silence means a dead agent.
_CONNECT_SECONDS, _SILENCE_SECONDS = 5.0, 30.0
# Less than the agent's own (agent.__main__), so that it never closes one that is about to be used.
_KEEP_ALIVE_SECONDS = 60.0


class Received(NamedTuple):
    """A whole answer."""

    content: bytes
    headers: Mapping[str, str]


class AsyncHostClient:
    """The agent from inside an event loop.  Raises the same as HostClient."""

    def __init__(self, socket: Path | str) -> None:
        self.socket = Path(socket)
        self._connections = AgentConnections(
            str(socket),
            connect_seconds=scaled(_CONNECT_SECONDS),
            idle_seconds=_KEEP_ALIVE_SECONDS,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections that are not in use."""
        self._connections.close()

    async def exec_frames(self, sandbox_id: str, request: Exec) -> AsyncIterator[ExecFrame]:
        """Run a command, yielding its frames; close the iterator early to kill it.

        A frame of kind ``error`` or ``exited`` is the last.  Raises only errors from before the
        command started; TooManyCommands if it would exceed its quota.
        """
        path, body = f"/sandboxes/{sandbox_id}/exec", encode(request)
        async with self._send("POST", path, body, _SILENCE_SECONDS) as connection:
            async for line in connection.lines():
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

    async def code_frames(self, sandbox_id: str, request: RunCode) -> AsyncIterator[CodeFrame]:
        """Run code in a kernel, yielding its frames; close the iterator early to interrupt it.

        A frame of kind ``done`` is the last.  Raises only errors from before the code ran; one that
        a first kernel has to be started for can take a minute.
        """
        path, body = f"/sandboxes/{sandbox_id}/code", encode(request)
        silence = KERNEL_SECONDS + request.timeout_seconds
        async with self._send("POST", path, body, silence) as connection:
            async for line in connection.lines():
                if line.strip():
                    yield parse(CodeFrame, line)

    async def follow_command(
        self, sandbox_id: str, command_id: str, request: FollowCommand
    ) -> AsyncIterator[CommandFrame]:
        """What a background command prints, until it ends or the time is over.

        Raises NotFound, ContainerGone, TooManyCommands (as many follow as may); HostUnavailable
        also in between.
        """
        path = f"/sandboxes/{sandbox_id}/commands/{command_id}/follow"
        body = encode(request)
        async with self._send("POST", path, body, _SILENCE_SECONDS) as connection:
            async for line in connection.lines():
                if line.strip():
                    frame = parse(CommandFrame, line)
                    if frame.kind == "refused":
                        raise TooManyCommands(frame.message)
                    yield frame

    async def ask(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Make the call of a method of HostClient (:mod:`hostruntime.client.calls`), as it does."""
        call: Call[Any] = getattr(calls, name)(*args, **kwargs)
        assert isinstance(call.content, bytes)
        async with self._send(
            call.method, call.target, call.content, call.silence_seconds
        ) as connection:
            content = await connection.read()
        return call.read(Received(content, connection.headers))

    @asynccontextmanager
    async def read_part(
        self, sandbox_id: str, path: str, wanted: WantedPart
    ) -> AsyncIterator[tuple[FilePart, AsyncIterator[memoryview]]]:
        """Open a part of a file: what it is, and its bytes as they come.

        Each piece is valid until the next is asked for.  They are fewer than promised if the file
        is cut meanwhile, or what reads it ends.  Raises NotFound, ContainerGone,
        FileConflict (not a file), RangeNotSatisfiable, TooManyTransfers.
        """
        with _transport_errors(self.socket):
            request = OpenTransfer(sandbox_id, path, wanted=wanted)
            async with begun(self.socket, request) as transfer:
                assert transfer.part is not None
                yield transfer.part, transfer.pieces()

    async def write_stream(
        self, sandbox_id: str, path: str, length: int, content: AsyncIterator[bytes | memoryview]
    ) -> int:
        """Write ``length`` bytes as they come to a file of mode 0644, whole or not at all.

        Returns the bytes written.  What ``content`` raises is raised here, and leaves the file as
        it was; so does content that is shorter.  Raises ContainerGone, FileConflict, NoSpace,
        TooManyTransfers, InvalidRequest.
        """
        with _transport_errors(self.socket):
            async with begun(self.socket, OpenTransfer(sandbox_id, path, length)) as transfer:
                return await transfer.write(content)

    @asynccontextmanager
    async def _send(
        self, method: str, target: str, body: bytes, silence: float
    ) -> AsyncIterator[AgentConnection]:
        async with self._connection() as connection:
            status = await connection.send(method, target, body, scaled(silence))
            if status >= HTTPStatus.BAD_REQUEST:
                raise parse_error(status, await connection.read())
            yield connection

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[AgentConnection]:
        with _transport_errors(self.socket):
            connection = await self._connections.take()
            try:
                yield connection
            finally:
                # Left before the answer's end, it is closed, and that kills the command.
                await self._connections.give_back(connection)


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
    except TimeoutError as error:
        raise no_answer(socket) from error
    except OSError as error:
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
