"""The agent's side of a bridge: a connection to a process inside a sandbox, which is not trusted.

What a bridge is, and what it says, is in :mod:`hostruntime.container.inside_bridge`.  Whoever owns
the sandbox can replace it by anything.  So each line is parsed within bounds, by the messages of
:mod:`hostruntime.wire.interpreter` and nothing else; descriptors that come along are dropped by the
kernel, as none are asked for (unix(7)); a flood is read at a slower pace, and then not at all; and
nobody waits for a bridge longer than until a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from hostruntime.host.patience import Patience
from hostruntime.host.tasks import in_thread
from hostruntime.wire.interpreter import CodeFrame
from hostruntime.wire.message import MalformedError, Message, decode

BOOTSTRAP = (
    "import socket\n"
    "listener = socket.socket(fileno=0)\n"
    "connection = listener.accept()[0]\n"
    "lines = connection.makefile('rb')\n"
    "exec(compile(lines.read(int(lines.readline())), 'orkestr-interpreter', 'exec'))\n"
)
"""What the image's Python runs: it reads the bridge's text from its first connection."""
# The bridge imports the other module by its name here.
_PROGRAM = """\
import sys, types
outputs = types.ModuleType("hostruntime.container.inside_outputs")
exec({outputs!r}, vars(outputs))
sys.modules[outputs.__name__] = outputs
exec(compile({bridge!r}, "orkestr-interpreter", "exec"))
"""
MAX_LINE_BYTES = 8 * 1024 * 1024
MAX_RUN_BYTES = 24 * 1024 * 1024
_BACKLOG = 16
# Longer than it may take to interrupt what runs, or to kill the kernel.
_BUSY_SECONDS, _BUSY_POLL_SECONDS = 10.0, 0.02
_READ_BYTES = 256 * 1024
# Reads after which whoever sends little at a time is read less often.
_FAST_READS, _SLOW_SECONDS = 500, 0.005
# Lines, of which many fit into one read, after which others have their turn on the event loop.
_LINES_AT_ONCE = 64
# Smaller lines are parsed on the event loop.
_SMALL_BYTES = 16 * 1024
SOCKET = "socket"


class BridgeGone(Exception):  # noqa: N818 - a state of affairs
    """The bridge has ended, or says what none would; the text says which."""


@dataclass(frozen=True)
class Started(Message):
    """A bridge's answer to ``start`` and ``adopt``."""

    kind: Literal["ready", "unavailable", "failed"]
    message: Annotated[str, Field(max_length=4096)] = ""


def listen(directory: Path) -> socket.socket:
    """Create the socket that a bridge listens on.  Raises OSError.

    Its own name, which a process that has it can read, says nothing of the host's directories.
    """
    with _handle(directory) as handle:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            listener.bind(f"/proc/self/fd/{handle}/{SOCKET}")
            listener.listen(_BACKLOG)
        except BaseException:
            listener.close()
            raise
        return listener


@contextlib.contextmanager
def _handle(directory: Path) -> Iterator[int]:
    handle = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield handle
    finally:
        os.close(handle)


async def _wait_for(directory: Path) -> socket.socket:
    """A connection to a bridge, which may be busy with what others have left.  Raises BridgeGone.

    It takes no more connections then (EAGAIN in connect(2)) until it has interrupted that.
    """
    patience = Patience(_BUSY_SECONDS)
    while True:
        try:
            return await in_thread(_connect, directory)
        except BlockingIOError as error:
            if patience.exhausted():
                raise BridgeGone("It does not take what it is asked any more.") from error
        except OSError as error:
            raise BridgeGone("It does not listen any more.") from error
        await asyncio.sleep(_BUSY_POLL_SECONDS)


def _connect(directory: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        connection.settimeout(0)
        with _handle(directory) as handle:
            connection.connect(f"/proc/self/fd/{handle}/{SOCKET}")
    except BaseException:
        connection.close()
        raise
    return connection


@cache
def _texts() -> tuple[bytes, str]:
    """The texts of the bridge, and of what a Python kernel runs first; blocks."""
    programs = Path(__file__).parents[1] / "container"
    outputs, bridge, charts = (
        (programs / f"inside_{name}.py").read_text() for name in ("outputs", "bridge", "charts")
    )
    return _PROGRAM.format(outputs=outputs, bridge=bridge).encode(), charts


@dataclass
class Bridge:
    """One connection to a bridge."""

    connection: socket.socket
    _buffer: bytearray = field(default_factory=bytearray)
    _received: int = 0
    _reads: int = 0
    _lines: int = 0

    @classmethod
    @asynccontextmanager
    async def connect(cls, directory: Path) -> AsyncGenerator[Bridge, None]:
        """Connect to the bridge of a context's directory.  Raises BridgeGone."""
        connection = await _wait_for(directory)
        try:
            yield cls(connection)
        finally:
            # It interrupts what it runs.
            connection.close()

    async def start(self, language: str, cwd: str) -> Started:
        """Have a new bridge start its kernel.  Raises BridgeGone."""
        text, setup = await in_thread(_texts)
        request = {"op": "start", "language": language, "cwd": cwd, "setup": setup}
        await self._send(b"%d\n%s" % (len(text), text))
        await self._send_line(request)
        return await self._receive(Started)

    async def adopt(self, environment: Mapping[str, str], cwd: str) -> Started:
        """Have a kernel that has run nothing yet add these variables.  Raises BridgeGone."""
        await self._send_line({"op": "adopt", "environment": dict(environment), "cwd": cwd})
        return await self._receive(Started)

    async def run(
        self, code: str, seconds: float, *, silent: bool = False
    ) -> AsyncGenerator[CodeFrame, None]:
        """Have it run code; the last frame is ``done``.  Raises BridgeGone."""
        await self._send_line({"op": "run", "code": code, "seconds": seconds, "silent": silent})
        while True:
            frame = await self._receive(CodeFrame)
            if frame.kind == "started":
                raise BridgeGone("It does not keep to the protocol.")
            yield frame
            if frame.kind == "done":
                return

    async def _send_line(self, request: Mapping[str, Any]) -> None:
        await self._send(json.dumps(request, ensure_ascii=False).encode() + b"\n")

    async def _send(self, data: bytes) -> None:
        try:
            await asyncio.get_running_loop().sock_sendall(self.connection, data)
        except OSError as error:
            raise BridgeGone("It has ended.") from error

    async def _receive[M: Message](self, kind: type[M]) -> M:
        line = await self._line()
        self._lines += 1
        if self._lines % _LINES_AT_ONCE == 0:
            await asyncio.sleep(_SLOW_SECONDS)
        try:
            if len(line) < _SMALL_BYTES:
                return decode(kind, line)
            return await in_thread(decode, kind, line)
        except MalformedError as error:
            raise BridgeGone("It does not keep to the protocol.") from error

    async def _line(self) -> bytes:
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if searched > MAX_LINE_BYTES or self._received > MAX_RUN_BYTES:
                raise BridgeGone("It sends more than any would.")
            await self._read()
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    async def _read(self) -> None:
        self._reads += 1
        if self._reads > _FAST_READS:
            await asyncio.sleep(_SLOW_SECONDS)
        loop = asyncio.get_running_loop()
        try:
            data = await loop.sock_recv(self.connection, _READ_BYTES)
        except OSError as error:
            raise BridgeGone("It has ended.") from error
        if not data:
            raise BridgeGone("It has ended.")
        self._received += len(data)
        self._buffer += data
