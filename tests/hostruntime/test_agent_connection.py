"""The client's own connections, against a server that answers as one would rather not be."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from hostruntime.client import async_host_client as client_module
from hostruntime.client.async_host_client import AsyncHostClient
from hostruntime.client.connection import BUFFER_BYTES
from hostruntime.errors import HostUnavailable, NotFound
from hostruntime.wire.background import CommandInfo, StartCommand
from hostruntime.wire.commands import Exec, ExecFrame
from hostruntime.wire.message import encode

type Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"
EXITED = encode(ExecFrame("exited", code=0, duration_ms=3)) + b"\n"


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def output(data: bytes) -> bytes:
    return encode(ExecFrame("chunk", stream="stdout", data=data)) + b"\n"


class Server:
    """Answers each request with the next of ``answers``; the last is repeated."""

    def __init__(self, *answers: Answer) -> None:
        self._answers = list(answers)
        self.connections = 0
        self.requests: list[dict[str, Any]] = []
        self.hung_up = asyncio.Event()
        self._writers: list[asyncio.StreamWriter] = []

    def end_connections(self) -> None:
        """As when it is stopped."""
        for writer in self._writers:
            writer.close()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.append(writer)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                self.requests.append(json.loads(await reader.readexactly(length)))
                answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
                await answer(writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.hung_up.set()
        finally:
            writer.close()


@asynccontextmanager
async def served(tmp_path: Path, *answers: Answer) -> AsyncIterator[tuple[Server, AsyncHostClient]]:
    server = Server(*answers)
    listening = await asyncio.start_unix_server(server.serve, tmp_path / "host.sock")
    async with listening, AsyncHostClient(tmp_path / "host.sock") as client, asyncio.timeout(30):
        yield server, client


async def well(writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + chunk(output(b"hello")) + chunk(EXITED) + END)


async def test_requests_one_after_the_other_share_a_connection(tmp_path: Path) -> None:
    async with served(tmp_path, well) as (server, client):
        for number in range(5):
            result = await client.exec_to_completion("sbx_1", Exec(f"echo {number}"))
            assert (result.code, result.stdout) == (0, b"hello")
        assert server.connections == 1
        assert [request["command"] for request in server.requests] == [
            f"echo {n}" for n in range(5)
        ]


async def test_requests_at_once_have_a_connection_each(tmp_path: Path) -> None:
    async with served(tmp_path, well) as (server, client):
        commands = (client.exec_to_completion("sbx_1", Exec("true")) for _ in range(40))
        assert {result.code for result in await asyncio.gather(*commands)} == {0}
        assert 1 < server.connections <= 40


async def test_lines_are_whole_however_they_come(tmp_path: Path) -> None:
    async def in_pieces(writer: asyncio.StreamWriter) -> None:
        body = HEAD + b"".join(chunk(bytes([each])) for each in output(b"hello") + b"\n" + EXITED)
        for start in range(0, len(body + END), 7):
            writer.write((body + END)[start : start + 7])
            await asyncio.sleep(0)

    async with served(tmp_path, in_pieces, well) as (server, client):
        result = await client.exec_to_completion("sbx_1", Exec("true"))
        assert (result.code, result.stdout) == (0, b"hello")
        assert (await client.exec_to_completion("sbx_1", Exec("true"))).code == 0
        assert server.connections == 1


async def test_more_than_is_buffered_is_read_and_the_connection_used_again(tmp_path: Path) -> None:
    piece = b"x" * 64 * 1024
    pieces = 3 * BUFFER_BYTES // len(piece)

    async def much(writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD)
        for _ in range(pieces):
            writer.write(chunk(output(piece)))
            await writer.drain()
        writer.write(chunk(EXITED) + END)

    async with served(tmp_path, much, well) as (server, client):
        result = await client.exec_to_completion("sbx_1", Exec("true"))
        assert len(result.stdout) == pieces * len(piece)
        assert (await client.exec_to_completion("sbx_1", Exec("true"))).stdout == b"hello"
        assert server.connections == 1


async def test_an_error_is_raised_and_its_connection_used_again(tmp_path: Path) -> None:
    async def missing(writer: asyncio.StreamWriter) -> None:
        body = b'{"code": "not_found",\n "message": "There is none."}'
        head = f"HTTP/1.1 404 Not Found\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        writer.write(head + body)

    async with served(tmp_path, missing, well) as (server, client):
        with pytest.raises(NotFound):
            await client.exec_to_completion("sbx_1", Exec("true"))
        await client.exec_to_completion("sbx_1", Exec("true"))
        assert server.connections == 1


async def test_whoever_gives_up_hangs_up(tmp_path: Path) -> None:
    """Which is how the agent learns that it has to kill the command."""
    begun = asyncio.Event()

    async def endless(writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + chunk(encode(ExecFrame("started", pid=1)) + b"\n"))
        begun.set()

    async with served(tmp_path, endless) as (server, client):
        running = asyncio.create_task(client.exec_to_completion("sbx_1", Exec("sleep 60")))
        await begun.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await server.hung_up.wait()


async def silent(writer: asyncio.StreamWriter) -> None:
    """It says nothing."""


async def falls_silent(writer: asyncio.StreamWriter) -> None:
    """It says nothing more."""
    writer.write(HEAD + chunk(output(b"hello")))


async def hangs_up(writer: asyncio.StreamWriter) -> None:
    """It ends in the middle."""
    writer.write(HEAD + chunk(output(b"hello")))
    writer.close()


async def babbles(writer: asyncio.StreamWriter) -> None:
    """It does not speak HTTP."""
    writer.write(b"220 mail.example ESMTP\r\n")


@pytest.mark.parametrize("answer", [silent, falls_silent, hangs_up, babbles])
async def test_an_agent_that_does_not_answer_properly_is_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Answer
) -> None:
    monkeypatch.setattr(client_module, "_SILENCE_SECONDS", 0.2)
    async with served(tmp_path, answer, well) as (_, client):
        with pytest.raises(HostUnavailable):
            await client.exec_to_completion("sbx_1", Exec("true"))
        # The next is asked for with another connection.
        assert (await client.exec_to_completion("sbx_1", Exec("true"))).code == 0


async def test_one_that_was_restarted_is_connected_to_anew(tmp_path: Path) -> None:
    async with served(tmp_path, well) as (server, client):
        await client.exec_to_completion("sbx_1", Exec("true"))
        server.end_connections()
        await server.hung_up.wait()
        assert (await client.exec_to_completion("sbx_1", Exec("true"))).code == 0
        assert server.connections == 2


async def test_one_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    async with AsyncHostClient(tmp_path / "host.sock") as client:
        with pytest.raises(HostUnavailable, match="is it running"):
            await client.exec_to_completion("sbx_1", Exec("true"))


async def test_an_answer_that_does_not_fit_is_read_and_so_is_the_next_on_its_connection(
    tmp_path: Path,
) -> None:
    """The end of a long answer may come while nothing more is read."""
    text = "x" * (2 * BUFFER_BYTES)
    info = CommandInfo("cmd", text, 3, running=True, started_at=1.5)

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + chunk(encode(info)) + END)
        await writer.drain()

    async with served(tmp_path, answer) as (server, client):
        for _ in range(3):
            assert await client.ask("start_command", "sbx", StartCommand("cmd", "true")) == info
        assert server.connections == 1
