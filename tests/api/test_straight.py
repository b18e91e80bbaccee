"""Large bodies by way of a connection's socket: what Twisted is left with, and how it ends."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.web import http

from orkestr_console.http import straight, uploads
from orkestr_console.http.sharing import CountedTransport
from orkestr_console.http.straight import REQUEST_KEY, outlet
from orkestr_console.http.uploads import LAST_BYTES, RECEIVE_BYTES, UploadBody

MIB = 1024 * 1024
CONTENT = bytes(range(256)) * 4096 * 16


class Channel:
    """Twisted's of a connection with a body of ``length`` bytes, which the server reads none of."""

    def __init__(self, length: int, *, idle_seconds: float = 60.0) -> None:
        self.client, self.server = socket.socketpair()
        self._transferDecoder = SimpleNamespace(contentLength=length)
        self.transport = self
        self.timeOut: float | None = idle_seconds
        self.bufferSize = self.unsent_bytes = 65536
        self.reads, self.aborted = True, asyncio.Event()
        self.fileno = self.server.fileno

    def setTimeout(self, seconds: float | None) -> None:  # noqa: N802 - Twisted's name
        self.timeOut = seconds

    def pauseProducing(self) -> None:  # noqa: N802 - Twisted's name
        self.reads = False

    def resumeProducing(self) -> None:  # noqa: N802 - Twisted's name
        self.reads = True

    def forceAbortClient(self) -> None:  # noqa: N802 - Twisted's name
        self.aborted.set()

    def read(self, body: UploadBody) -> None:
        """What Twisted does once it has something to read."""
        assert self.reads
        left = self._transferDecoder.contentLength
        self._transferDecoder.contentLength -= len(data := self.server.recv(left))
        body.feed(data)
        if len(data) == left:
            body.end()


type Connect = Callable[..., Channel]


@pytest.fixture
def connect() -> Iterator[Connect]:
    made: list[Channel] = []

    def create(length: int, **options: Any) -> Channel:
        made.append(Channel(length, **options))
        return made[-1]

    yield create
    for each in made:
        # The copies of its descriptor have gone.
        assert descriptors(each.server) == 1
        each.client.close()
        each.server.close()


def descriptors(sock: socket.socket) -> int:
    """How many this process has of a socket."""
    own = Path("/proc/self/fd")
    wanted, found = (own / str(sock.fileno())).readlink(), 0
    for each in own.iterdir():
        with suppress(FileNotFoundError):
            found += each.readlink() == wanted
    return found


async def sent(channel: Channel, data: bytes) -> None:
    channel.client.settimeout(0)
    await asyncio.get_running_loop().sock_sendall(channel.client, data)


async def eventually(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def test_most_of_a_large_body_comes_through_one_buffer(connect: Connect) -> None:
    channel = connect(len(CONTENT))
    body = UploadBody(channel, expects=False)
    got, buffers = bytearray(), set()
    # Twisted has read something before, and is paused while somebody else reads.
    await sent(channel, CONTENT[:1000])
    channel.read(body)
    sending = asyncio.create_task(sent(channel, CONTENT[1000:]))
    async with asyncio.timeout(60):
        async for piece in body.pieces():
            assert len(piece) <= RECEIVE_BYTES
            got += piece
            if isinstance(piece, memoryview):
                buffers.add(id(piece.obj))
                assert not channel.reads
            if len(got) == len(CONTENT) - LAST_BYTES:
                asyncio.get_running_loop().call_later(0.01, channel.read, body)
        await sending
    assert bytes(got) == CONTENT
    assert len(buffers) == 1
    assert body.complete
    assert channel.reads


async def test_a_short_body_is_left_to_twisted(connect: Connect) -> None:
    channel = connect(MIB)
    body = UploadBody(channel, expects=False)
    reading = asyncio.ensure_future(anext(aiter(body.pieces())))
    await sent(channel, CONTENT[:1000])
    await asyncio.sleep(0.05)
    assert not reading.done()
    channel.read(body)
    assert await reading == CONTENT[:1000]


@pytest.mark.parametrize("how", ["end", "reset"])
async def test_twisted_learns_that_a_client_has_left(connect: Connect, how: str) -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    channel = connect(16 * MIB)
    with listening:
        client = socket.create_connection(listening.getsockname())
        with listening.accept()[0] as server:
            channel.fileno = server.fileno
            pieces = UploadBody(channel, expects=False).pieces()
            client.sendall(b"abc")
            assert await anext(pieces) == b"abc"
            if how == "reset":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
            waiting = asyncio.ensure_future(anext(pieces))
            await eventually(lambda: channel.reads)
            # Its view waits to be cancelled.
            assert not waiting.done()
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting


async def test_a_client_that_sends_nothing_is_disconnected(connect: Connect) -> None:
    channel = connect(16 * MIB, idle_seconds=0.2)
    pieces = UploadBody(channel, expects=False).pieces()
    await sent(channel, b"abc")
    assert await anext(pieces) == b"abc"
    waiting = asyncio.ensure_future(anext(pieces))
    async with asyncio.timeout(60):
        await channel.aborted.wait()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert channel.reads


async def test_a_client_is_waited_for_as_long_after_a_pause(connect: Connect) -> None:
    channel = connect(MIB)
    body = UploadBody(channel, expects=False)
    body.feed(bytes(uploads.MAX_HELD_BYTES + 1))
    # It isn't the client that is waited for.
    assert not channel.reads
    assert channel.timeOut is None
    pieces = body.pieces()
    await anext(pieces)
    waiting = asyncio.ensure_future(anext(pieces))
    await eventually(lambda: channel.reads)
    assert channel.timeOut == 60.0
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


async def test_a_body_that_is_not_wanted_is_twisteds_again(connect: Connect) -> None:
    channel = connect(16 * MIB)
    pieces = UploadBody(channel, expects=False).pieces()
    await sent(channel, b"abc")
    await anext(pieces)
    await pieces.aclose()
    assert channel.reads


def request_over(channel: Any) -> Any:
    """A request on it; it can be cut off."""
    server_request = SimpleNamespace(channel=channel, cut_off=lambda: channel.aborted.set())
    return SimpleNamespace(scope={REQUEST_KEY: server_request})


async def test_a_response_goes_out_by_the_socket(connect: Connect) -> None:
    channel = connect(0)
    channel.client.settimeout(0)
    got, loop = bytearray(), asyncio.get_running_loop()

    async def read() -> None:
        while len(got) < len(CONTENT):
            got.extend(await loop.sock_recv(channel.client, MIB))

    reading = asyncio.create_task(read())
    with outlet(request_over(channel)) as client:
        assert client is not None
        # Twisted now says when everything has left.
        assert channel.unsent_bytes == 0
        for start in range(0, len(CONTENT), MIB):
            assert await client.send(memoryview(CONTENT)[start : start + MIB])
    async with asyncio.timeout(60):
        await reading
    assert got == CONTENT
    assert channel.unsent_bytes == 65536


def test_what_a_client_sends_meanwhile_is_read_as_usual() -> None:
    """Twisted adds up anew, with each piece that it reads, all that came before its turn."""
    pieces: list[bytes] = []
    transport: Any = CountedTransport.__new__(CountedTransport)
    transport.socket, client = socket.socketpair()
    transport.connected, transport._tempDataLen = True, 0
    transport.fileno = transport.socket.fileno
    transport.protocol = SimpleNamespace(dataReceived=pieces.append)
    with client, transport.socket:
        client.sendall(b"GET / HTTP/1.1")
        with outlet(request_over(SimpleNamespace(transport=transport))) as straight_out:
            assert straight_out is not None
            assert not transport._isSendBufferFull()
            transport._tempDataLen = 1
            assert transport._isSendBufferFull()
            transport.doRead()
        assert not transport._isSendBufferFull()
    assert pieces == [b"GET / HTTP/1.1"]


async def test_a_client_that_reads_nothing_is_cut_off(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(straight, "STALL_TIMEOUT", 0.2)
    channel = connect(0)
    with outlet(request_over(channel)) as client:
        assert client is not None
        assert not await client.send(memoryview(CONTENT))
        assert channel.aborted.is_set()


def test_without_another_descriptor_a_response_is_sent_as_any_other(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = connect(0)
    with monkeypatch.context() as patched:
        patched.setattr(os, "dup", Mock(side_effect=OSError(errno.EMFILE, "too many")))
        with outlet(request_over(channel)) as client:
            assert client is None
            assert channel.unsent_bytes == 65536


async def test_a_client_that_has_left_gets_no_more(connect: Connect) -> None:
    channel = connect(0)
    channel.client.close()
    with outlet(request_over(channel)) as client:
        assert client is not None
        assert not await client.send(memoryview(CONTENT))
    assert not channel.aborted.is_set()


def test_a_response_of_another_server_has_no_socket() -> None:
    gone = SimpleNamespace(scope={REQUEST_KEY: SimpleNamespace(channel=None)})
    for request in (SimpleNamespace(), SimpleNamespace(scope={}), gone):
        with outlet(request) as client:  # type: ignore[arg-type]
            assert client is None


class Received(http.Request):
    """A request with an upload's body."""

    body: UploadBody

    def gotLength(self, length: int | None) -> None:  # noqa: N802 - Twisted's name
        self.body = UploadBody(self.channel, expects=False)

    def handleContentChunk(self, data: bytes) -> None:  # noqa: N802 - Twisted's name
        self.body.feed(data)

    def requestReceived(self, *_: bytes) -> None:  # noqa: N802 - Twisted's name
        self.body.end()


async def test_a_connection_is_closed_that_is_idle_after_a_body_nobody_read_yet() -> None:
    # Twisted's are not typed.
    kinds: Any = SimpleNamespace(channel=http.HTTPChannel, transport=StringTransport)
    channel = kinds.channel()
    channel.requestFactory, channel.timeOut = Received, 60.0
    channel.callLater = Clock().callLater
    channel.makeConnection(kinds.transport())
    # More than is taken before the view reads, in its last piece.
    length = uploads.MAX_HELD_BYTES + 1
    channel.dataReceived(b"PUT / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % length + bytes(length))
    [request] = channel.requests
    assert [len(piece) async for piece in request.body.pieces()] == [length]
    channel.requestDone(request)
    assert channel.timeOut == 60.0
