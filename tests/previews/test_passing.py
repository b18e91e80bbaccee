"""What passes through the front: as it comes, at the slower side's pace, and never two at once."""

from __future__ import annotations

import asyncio
import socket
import tracemalloc

import h11
import pytest

from orkestr_console.previews import exchange
from orkestr_console.previews.wire import Wire
from tests.previews.conftest import HOST, Echo, World, request, says

PIECE = b"x" * 65536
MIB = 1024 * 1024


async def read_body(reader: asyncio.StreamReader, size: int) -> int:
    read = 0
    while read < size and (data := await reader.read(65536)):
        read += len(data)
    return read


async def test_a_body_passes_as_it_comes_and_the_response_before_it_ends(world: World) -> None:
    seen: asyncio.Queue[bytes] = asyncio.Queue()

    async def program(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nearly\r\n")
        await seen.put(await reader.readuntil(b"one\r\n"))
        await seen.put(await reader.readuntil(b"0\r\n\r\n"))
        writer.write(b"4\r\nlate\r\n0\r\n\r\n")
        await writer.drain()

    world.program = program
    reader, writer = await world.visit(
        request("Transfer-Encoding: chunked", line="POST / HTTP/1.1") + b"3\r\none\r\n"
    )
    assert await reader.readuntil(b"early\r\n")
    assert (await seen.get()).endswith(b"3\r\none\r\n")
    writer.write(b"3\r\ntwo\r\n0\r\nTrailer: x\r\n\r\n")
    assert (await reader.read()).endswith(b"late\r\n0\r\n\r\n")
    assert b"Trailer" not in await seen.get()


async def test_fifty_megabytes_pass_and_a_few_pieces_are_held(world: World) -> None:
    async def program(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        read = await read_body(reader, 50 * MIB)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(str(read)))
        writer.write(str(read).encode())
        await writer.drain()

    world.program = program
    reader, writer = await world.visit(
        request(f"Content-Length: {50 * MIB}", line="PUT / HTTP/1.1")
    )
    tracemalloc.start()
    for _ in range(50 * MIB // len(PIECE)):
        writer.write(PIECE)
        await writer.drain()
    answer = await reader.read()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert answer.endswith(f"\r\n\r\n{50 * MIB}".encode())
    assert most < 4 * MIB


async def test_a_program_that_reads_nothing_stops_its_visitor(world: World) -> None:
    async def program(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    world.program = program
    _, writer = await world.visit(request(f"Content-Length: {50 * MIB}", line="PUT / HTTP/1.1"))
    assert await sent_until_stopped(writer) < 8 * MIB


async def test_a_visitor_that_reads_nothing_stops_the_program(world: World) -> None:
    sent: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def program(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        sent.set_result(await sent_until_stopped(writer))

    world.program = program
    await world.visit(request())
    assert await sent < 8 * MIB


async def test_requests_sent_at_once_are_answered_in_turn_and_not_collected(world: World) -> None:
    """Somebody who reads no answer must not fill the front's memory with what it asks."""
    world.program = echo = Echo()
    one = f"GET / HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()
    reader, _ = await world.visit(one * 50)
    for _ in range(50):
        await reader.readuntil(b"\r\n\r\nok")
    assert len(echo.heads) == 50

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    world.program, before = silent, world.connections
    _, writer = await world.visit()
    assert await sent_until_stopped(writer, one * 1000) < 8 * MIB
    assert world.connections == before + 1


async def sent_until_stopped(writer: asyncio.StreamWriter, data: bytes = PIECE) -> int:
    """How much is taken before nobody takes any more."""
    sent = 0
    try:
        while sent < 64 * MIB:
            writer.write(data)
            async with asyncio.timeout(1):
                await writer.drain()
            sent += len(data)
    except TimeoutError:
        pass
    return sent


async def test_others_go_on_although_there_is_always_more_to_pass(world: World) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)  # noqa: FBT003 - positional-only
        theirs.sendall(b"abc")
        others: list[bool] = []
        asyncio.get_running_loop().call_soon(others.append, True)  # noqa: FBT003 - positional
        assert await Wire(ours, h11.SERVER).receive_raw() == b"abc"
        assert others == [True]


async def test_what_expects_to_be_told_is_told_to_send(world: World) -> None:
    async def program(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"expect" not in head.lower()
        assert await reader.readexactly(3) == b"abc"
        writer.write(b"HTTP/1.1 204 No\r\n\r\n")
        await writer.drain()

    world.program = program
    headers = ("Content-Length: 3", "Expect: 100-continue")
    reader, writer = await world.visit(request(*headers, line="PUT / HTTP/1.1"))
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
    writer.write(b"abc")
    assert (await reader.read()).startswith(b"HTTP/1.1 204 ")


async def test_a_program_that_refuses_a_body_is_heard(world: World) -> None:
    async def program(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()

    world.program = program
    reader, writer = await world.visit(
        request(f"Content-Length: {50 * MIB}", line="PUT / HTTP/1.1")
    )
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 413 ")
    writer.write(PIECE)


async def test_a_visitor_who_leaves_takes_the_request_along(world: World) -> None:
    left = asyncio.Event()

    async def program(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\ndata: 1\n\n")
        assert await reader.read() == b""
        left.set()

    world.program = program
    reader, writer = await world.visit(request())
    await reader.readuntil(b"data: 1")
    writer.close()
    async with asyncio.timeout(20):
        await left.wait()


async def test_a_websocket_passes_both_ways_from_the_first_byte(world: World) -> None:
    heads: list[bytes] = []

    async def program(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: x\r\n\r\nfirst"
        )
        assert await reader.readexactly(8) == b"eager..."
        writer.write(b"second")
        await writer.drain()

    world.program = program
    upgrade = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: k")
    sent = request(*upgrade).replace(b"Connection: close\r\n", b"")
    reader, writer = await world.visit(sent + b"eager")
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101 ")
    assert b"upgrade: websocket" in head and b"sec-websocket-accept: x" in head.lower()
    assert await reader.readexactly(5) == b"first"
    writer.write(b"...")
    assert await reader.read() == b"second"
    assert b"upgrade: websocket" in heads[0] and b"sec-websocket-key: k" in heads[0].lower()


async def test_a_websocket_that_is_refused_is_a_response(world: World) -> None:
    world.program = Echo()
    sent = request("Connection: Upgrade", "Upgrade: websocket").replace(
        b"Connection: close\r\n", b""
    )
    reader, _ = await world.visit(sent)
    assert (await reader.readuntil(b"\r\n\r\nok")).startswith(b"HTTP/1.1 200 ")


async def test_what_nothing_passes_through_ends(world: World, monkeypatch: object) -> None:
    async def program(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    world.program = program
    monkeypatch.setattr(exchange, "RESPONSE_SECONDS", 0.05)  # type: ignore[attr-defined]
    monkeypatch.setattr(exchange, "BODY_SECONDS", 0.05)  # type: ignore[attr-defined]
    assert b" 504 " in await world.ask(request())


@pytest.mark.parametrize("inwards", [True, False])
async def test_many_small_chunks_keep_nobody_waiting(world: World, *, inwards: bool) -> None:
    turns, many = 0, 5000
    chunks = b"1\r\na\r\n" * many + b"0\r\n\r\n"

    async def count_turns() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    async def reads_all(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n0\r\n\r\n")
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")

    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    world.program = reads_all if inwards else says(head + chunks)
    sent = request("Transfer-Encoding: chunked", line="POST / HTTP/1.1") + chunks
    counting = asyncio.create_task(count_turns())
    answer = await world.ask(sent if inwards else request())
    counting.cancel()
    assert answer.startswith(b"HTTP/1.1 204" if inwards else b"HTTP/1.1 200")
    assert turns >= many
