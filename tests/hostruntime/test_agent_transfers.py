"""The client's streams of files, against an agent that answers as one would rather not have it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from hostruntime.client import transfers as client_module
from hostruntime.client.async_host_client import AsyncHostClient
from hostruntime.client.transfers import PIECE_BYTES
from hostruntime.errors import HostFault, HostUnavailable, InvalidRequest, NoSpace
from hostruntime.host.tasks import in_background, readable, receive_into, send_all
from hostruntime.wire.files import FilePart, FileStat, WantedPart
from hostruntime.wire.message import decode, encode
from hostruntime.wire.transfers import OpenTransfer, TransferAnswer

MIB = 1024 * 1024
PIECE = bytes(range(256)) * 4096
REFUSAL = NoSpace("There is no space left.").to_wire()
FILE = FilePart(FileStat("/f", exists=True, size=50 * MIB, mode=0o644), 0, 50 * MIB)


class Served:
    """One transfer, as the agent has it: the connection, the request, the other end of a stream."""

    def __init__(self, link: socket.socket, request: OpenTransfer) -> None:
        self.link, self.request = link, request
        self.stream, self._theirs = socket.socketpair()
        self.stream.settimeout(0)

    def hand_over(self, answer: TransferAnswer) -> None:
        with self._theirs:
            socket.send_fds(self.link, [encode(answer)], [self._theirs.fileno()])

    def say(self, answer: TransferAnswer) -> None:
        self.link.send(encode(answer))

    async def read(self, size: int) -> bytes:
        """So many bytes, or fewer at the end."""
        data = bytearray()
        buffer = memoryview(bytearray(MIB))
        while len(data) < size:
            count = await receive_into(self.stream, buffer[: size - len(data)], None)
            if not count:
                break
            data += buffer[:count]
        return bytes(data)


type Serve = Callable[[Served], Awaitable[None]]


@asynccontextmanager
async def served(tmp_path: Path, serve: Serve) -> AsyncIterator[AsyncHostClient]:
    path = tmp_path / "host.sock"

    async def answer() -> None:
        await readable(listening.fileno())
        link, _ = listening.accept()
        with link:
            await readable(link.fileno())
            one = Served(link, decode(OpenTransfer, link.recv(32768)))
            with one.stream:
                await serve(one)

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as listening:
        listening.bind(f"{path}.ports")
        listening.listen()
        task = in_background(answer(), "the fake agent failed")
        try:
            async with AsyncHostClient(path) as client, asyncio.timeout(30):
                yield client
                await task
        finally:
            task.cancel()


class Content:
    def __init__(self, count: int) -> None:
        self.count, self.taken = count, 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for _ in range(self.count):
            yield PIECE
            self.taken += 1

    def sent(self, client: AsyncHostClient) -> Awaitable[int]:
        return client.write_stream("sbx_1", "/f", self.count * MIB, aiter(self))


async def test_more_is_taken_only_as_the_stream_takes_it(tmp_path: Path) -> None:
    may_read = asyncio.Event()

    async def slow(one: Served) -> None:
        assert (one.request.sandbox, one.request.path, one.request.size) == ("sbx_1", "/f", 9 * MIB)
        one.hand_over(TransferAnswer())
        await may_read.wait()
        assert await one.read(9 * MIB + 1) == PIECE * 9
        one.say(TransferAnswer(written=3))

    content = Content(9)
    async with served(tmp_path, slow) as client:
        sending = asyncio.ensure_future(content.sent(client))
        await asyncio.sleep(0.3)
        assert content.taken <= 2
        may_read.set()
        assert await sending == 3
        assert content.taken == 9


async def test_a_refusal_ends_the_content_even_between_its_pieces(tmp_path: Path) -> None:
    ended = asyncio.Event()

    async def stalling() -> AsyncIterator[bytes]:
        try:
            yield PIECE
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def refuse(one: Served) -> None:
        one.hand_over(TransferAnswer())
        await one.read(MIB)
        one.say(TransferAnswer(REFUSAL))

    async with served(tmp_path, refuse) as client:
        with pytest.raises(NoSpace):
            await client.write_stream("sbx_1", "/f", 9 * MIB, stalling())
        assert ended.is_set()


@pytest.mark.parametrize("says", [True, False])
async def test_what_writes_the_file_may_end_before_the_agent_says_why(
    tmp_path: Path, says: bool
) -> None:
    async def hang_up(one: Served) -> None:
        one.hand_over(TransferAnswer())
        await one.read(3 * MIB)
        one.stream.close()
        await asyncio.sleep(0.2)
        if says:
            one.say(TransferAnswer(REFUSAL))

    content = Content(500)
    async with served(tmp_path, hang_up) as client:
        with pytest.raises(NoSpace if says else HostUnavailable):
            await content.sent(client)
    assert content.taken < 20


@pytest.mark.parametrize("opened", [True, False])
async def test_who_takes_or_answers_nothing_is_given_up_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: bool
) -> None:
    monkeypatch.setattr(client_module, "SILENCE_SECONDS", 0.2)
    monkeypatch.setattr(client_module, "scaled", lambda seconds: seconds)

    async def hang(one: Served) -> None:
        if opened:
            one.hand_over(TransferAnswer())
        # Until the client has hung up.
        await readable(one.link.fileno())

    async with served(tmp_path, hang) as client:
        with pytest.raises(HostUnavailable, match="did not answer in time"):
            await Content(500).sent(client)


async def test_content_that_fails_hangs_up(tmp_path: Path) -> None:
    async def read(one: Served) -> None:
        one.hand_over(TransferAnswer())
        assert len(await one.read(9 * MIB)) <= MIB
        assert one.link.recv(10) == b""

    async def failing() -> AsyncIterator[bytes]:
        yield PIECE
        raise KeyError("the client has gone")

    async with served(tmp_path, read) as client:
        with pytest.raises(KeyError):
            await client.write_stream("sbx_1", "/f", 9 * MIB, failing())


async def test_content_that_is_too_short_is_at_its_end(tmp_path: Path) -> None:
    async def refuse(one: Served) -> None:
        one.hand_over(TransferAnswer())
        assert await one.read(9 * MIB) == PIECE
        one.say(TransferAnswer(InvalidRequest("It ended too early.").to_wire()))

    async with served(tmp_path, refuse) as client:
        with pytest.raises(InvalidRequest):
            await client.write_stream("sbx_1", "/f", 9 * MIB, aiter(Content(1)))


@pytest.mark.parametrize("answer", [TransferAnswer(), TransferAnswer(REFUSAL)])
async def test_an_answer_without_a_stream_is_an_error(
    tmp_path: Path, answer: TransferAnswer
) -> None:
    async def refuse(one: Served) -> None:
        one.say(answer)

    async with served(tmp_path, refuse) as client:
        with pytest.raises(NoSpace if answer.error else HostFault):
            await Content(1).sent(client)


async def test_a_file_that_nobody_reads_stays_where_it_is_and_passes_in_few_pieces(
    tmp_path: Path,
) -> None:
    sent = 0

    async def send(one: Served) -> None:
        nonlocal sent
        assert one.request.wanted == WantedPart(None, 9)
        one.hand_over(TransferAnswer(part=FILE))
        for _ in range(50):
            await send_all(one.stream, PIECE, 30)
            sent += 1
        # More than was promised is not taken.
        one.stream.send(b"x")

    async with (
        served(tmp_path, send) as client,
        client.read_part("sbx_1", "/f", WantedPart(None, 9)) as (part, pieces),
    ):
        await asyncio.sleep(0.3)
        assert sent <= 2
        assert (part.length, part.stat.mode) == (50 * MIB, 0o644)
        total, buffers = 0, set()
        async for piece in pieces:
            assert len(piece) <= PIECE_BYTES
            total += len(piece)
            buffers.add(id(piece.obj))
        assert total == 50 * MIB
        # All of them are in one place.
        assert len(buffers) == 1


@pytest.mark.parametrize("reset", [True, False])
async def test_a_file_that_breaks_off_just_ends(tmp_path: Path, reset: bool) -> None:
    async def cut(one: Served) -> None:
        one.hand_over(TransferAnswer(part=FILE))
        await send_all(one.stream, b"abcd", 30)
        if not reset:
            one.stream.shutdown(socket.SHUT_WR)
            await readable(one.link.fileno())

    async with (
        served(tmp_path, cut) as client,
        client.read_part("sbx_1", "/f", WantedPart()) as (_, pieces),
    ):
        assert [bytes(piece) async for piece in pieces] == [b"abcd"]


async def test_nothing_of_a_transfer_stays_open(tmp_path: Path) -> None:
    async def serve(one: Served) -> None:
        one.hand_over(TransferAnswer(part=FILE))
        await readable(one.link.fileno())

    before = len(list(Path("/proc/self/fd").iterdir()))
    async with served(tmp_path, serve) as client:
        with pytest.raises(KeyError):
            async with client.read_part("sbx_1", "/f", WantedPart()):
                raise KeyError("the client has gone")
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


async def test_a_socket_that_is_always_ready_keeps_nobody_waiting() -> None:
    ours, theirs = socket.socketpair()
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    with ours, theirs:
        for one in (ours, theirs):
            one.settimeout(0)
        task = asyncio.create_task(other())
        buffer = memoryview(bytearray(1))
        for _ in range(50):
            await send_all(theirs, b"x", 30)
            assert await receive_into(ours, buffer, 30) == 1
        task.cancel()
    assert turns >= 50
