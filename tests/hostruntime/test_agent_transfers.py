"""The client's streams of files, against a server that answers as one would rather not be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from hostruntime.client import async_host_client as client_module
from hostruntime.client.async_host_client import AsyncHostClient
from hostruntime.client.connection import BUFFER_BYTES
from hostruntime.errors import HostUnavailable, NoSpace
from hostruntime.wire.files import WantedPart

type Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

MIB = 1024 * 1024
PIECE = bytes(MIB)
REFUSAL = b'{"code": "no_space", "detail": "There is no space left."}'
FULL = b"HTTP/1.1 409 Conflict\r\ncontent-length: %d\r\n\r\n%s" % (len(REFUSAL), REFUSAL)
WRITTEN = b'HTTP/1.1 200 OK\r\ncontent-length: 24\r\n\r\n{"path": "/f","size": 3}'
FILE = (
    b"HTTP/1.1 200 OK\r\nx-file-type: file\r\nx-file-size: 9\r\nx-file-mode: 644\r\n"
    b"x-file-modified-at: 1.5\r\nx-file-first: 0\r\nx-file-length: 9\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)


@asynccontextmanager
async def served(tmp_path: Path, serve: Serve) -> AsyncIterator[AsyncHostClient]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            await serve(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    listening = await asyncio.start_unix_server(answer, tmp_path / "host.sock")
    async with listening, AsyncHostClient(tmp_path / "host.sock") as client, asyncio.timeout(30):
        yield client


class Content:
    def __init__(self, count: int) -> None:
        self.count, self.taken = count, 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for _ in range(self.count):
            yield PIECE
            self.taken += 1

    def sent(self, client: AsyncHostClient) -> Awaitable[int]:
        return client.write_stream("sbx_1", "/f", self.count * MIB, aiter(self))


async def test_more_is_taken_only_as_the_agent_takes_it(tmp_path: Path) -> None:
    may_read = asyncio.Event()

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await may_read.wait()
        await reader.readexactly(50 * MIB)
        writer.write(WRITTEN)

    content = Content(50)
    async with served(tmp_path, slow) as client:
        sending = asyncio.ensure_future(content.sent(client))
        await asyncio.sleep(0.3)
        assert content.taken <= 2
        may_read.set()
        assert await sending == 3
        assert content.taken == 50


async def test_a_refusal_ends_the_content_even_between_its_pieces(tmp_path: Path) -> None:
    ended = asyncio.Event()

    async def stalling() -> AsyncIterator[bytes]:
        try:
            yield PIECE
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(MIB)
        writer.write(FULL)

    async with served(tmp_path, refuse) as client:
        with pytest.raises(NoSpace):
            await client.write_stream("sbx_1", "/f", 9 * MIB, stalling())
        assert ended.is_set()


async def test_an_agent_that_hangs_up_ends_it(tmp_path: Path) -> None:
    async def hang_up(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.readexactly(3 * MIB)

    content = Content(500)
    async with served(tmp_path, hang_up) as client:
        with pytest.raises(HostUnavailable):
            await content.sent(client)
    assert content.taken < 20


async def test_an_agent_that_takes_nothing_is_given_up_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_TRANSFER_SECONDS", 0.2)
    monkeypatch.setattr(client_module, "scaled", lambda seconds: seconds)

    async def hang(_: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
        await asyncio.sleep(2)

    async with served(tmp_path, hang) as client:
        with pytest.raises(HostUnavailable, match="did not answer in time"):
            await Content(500).sent(client)


async def test_content_that_fails_ends_the_connection(tmp_path: Path) -> None:
    hung_up = asyncio.Event()

    async def read(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        try:
            await reader.readexactly(9 * MIB)
        finally:
            hung_up.set()

    async def failing() -> AsyncIterator[bytes]:
        yield PIECE
        raise KeyError("the client has gone")

    async with served(tmp_path, read) as client:
        with pytest.raises(KeyError):
            await client.write_stream("sbx_1", "/f", 9 * MIB, failing())
        await hung_up.wait()


async def test_a_file_that_nobody_reads_stays_with_the_agent(tmp_path: Path) -> None:
    sent = 0

    async def send(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(FILE)
        for _number in range(50):
            writer.write(b"100000\r\n" + PIECE + b"\r\n")
            await writer.drain()
            sent += 1
        writer.write(b"0\r\n\r\n")

    async with (
        served(tmp_path, send) as client,
        client.read_part("sbx_1", "/f", WantedPart(None, 9)) as (part, pieces),
    ):
        await asyncio.sleep(0.3)
        assert sent <= BUFFER_BYTES // MIB + 3
        assert (part.length, part.stat.mode) == (9, 0o644)
        assert sum([len(piece) async for piece in pieces]) == 50 * MIB


async def test_a_file_that_breaks_off_is_an_error(tmp_path: Path) -> None:
    async def cut(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(FILE + b"4\r\nabcd\r\n")

    async with (
        served(tmp_path, cut) as client,
        client.read_part("sbx_1", "/f", WantedPart()) as (_, pieces),
    ):
        assert await anext(aiter(pieces)) == b"abcd"
        with pytest.raises(ConnectionError):
            await anext(aiter(pieces))


async def test_a_connection_whose_last_answer_ended_while_paused_takes_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_TRANSFER_SECONDS", 5.0)
    monkeypatch.setattr(client_module, "scaled", lambda seconds: seconds)
    # Its last byte is the first that is more than is buffered.
    size = BUFFER_BYTES + 1
    head = FILE.replace(b"transfer-encoding: chunked", b"content-length: %d" % size)

    async def both(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(head + bytes(size))
        await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(MIB)
        writer.write(WRITTEN)

    async with served(tmp_path, both) as client:
        assert len((await client.ask("read_path", "sbx_1", "/f")).content) == size
        assert await Content(1).sent(client) == 3
