"""The front on its own: no host, no database, and programs that tests write."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import pytest

from orkestr_console.core.preview_base import PreviewBase
from orkestr_console.previews.front import Front
from sandboxes_app import services
from sandboxes_app.models import Sandbox
from sandboxes_app.services import Unreached

ULID = "01arz3ndektsv4rrffq69g5fav"
SANDBOX = f"sbx_{ULID.upper()}"
HOST = f"3000-{ULID}.localhost:8001"
PEER = "203.0.113.9"

type Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
type Program = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def a_sandbox(**changes: object) -> Sandbox:
    return Sandbox(pk=SANDBOX, team_id=1, network="restricted", status="running", **changes)


@dataclass
class World:
    """A front, the sandbox that it knows, and the program in it, which is called by connection."""

    front: Front
    sandbox: Sandbox | None = field(default_factory=a_sandbox)
    program: Program | Unreached = Unreached.CLOSED
    woken: int = 0
    connections: int = 0
    ports: list[int] = field(default_factory=list)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _writers: list[asyncio.StreamWriter] = field(default_factory=list)

    async def find(self, sandbox_id: str) -> Sandbox | None:
        return self.sandbox if self.sandbox and self.sandbox.pk == sandbox_id else None

    async def connect(self, _: Sandbox, port: int) -> socket.socket | Unreached:
        self.ports.append(port)
        if isinstance(self.program, Unreached):
            return self.program
        ours, theirs = socket.socketpair()
        ours.setblocking(False)  # noqa: FBT003 - positional-only
        self.connections += 1
        self._tasks.append(asyncio.create_task(self._run(self.program, theirs)))
        return ours

    async def _run(self, program: Program, sock: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=sock)
        try:
            await program(reader, writer)
        finally:
            writer.close()

    async def wake(self, sandbox: Sandbox) -> None:
        self.woken += 1

    async def visit(self, sent: bytes = b"") -> Streams:
        """A visitor who has sent some bytes."""
        ours, theirs = socket.socketpair()
        self.front.begin(theirs, PEER)
        reader, writer = await asyncio.open_connection(sock=ours)
        self._writers.append(writer)
        writer.write(sent)
        return reader, writer

    async def ask(self, sent: bytes) -> bytes:
        """All that a visitor is answered until the connection ends."""
        reader, _ = await self.visit(sent)
        async with asyncio.timeout(20):
            return await reader.read()

    async def close(self) -> None:
        await self.front.finish(0)
        for writer in self._writers:
            writer.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    made = World(Front(PreviewBase("http", "localhost:8001")))
    monkeypatch.setattr(services, "find_previewed", made.find)
    monkeypatch.setattr(services, "connect_to_port", made.connect)
    monkeypatch.setattr(services, "wake_for_visitor", made.wake)
    yield made
    await made.close()


def request(*headers: str, line: str = "GET / HTTP/1.1", host: str = HOST) -> bytes:
    """A request whose connection ends with its answer."""
    return "\r\n".join([line, f"Host: {host}", "Connection: close", *headers, "", ""]).encode()


def says(answer: bytes) -> Program:
    """A program that reads a head, and answers always the same."""

    async def program(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()

    return program


@dataclass
class Echo:
    """A program that answers with the head that it was sent."""

    heads: list[str] = field(default_factory=list)

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.heads.append(head.decode())
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await writer.drain()
