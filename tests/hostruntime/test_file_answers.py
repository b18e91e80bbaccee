"""What a process inside a container answers to a file operation, when it is not ours any more."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hostruntime.container import files, inside_files
from hostruntime.container.inside_files import CHUNK_BYTES, LENGTH
from hostruntime.errors import Exhausted, HostError, NoSpace

PROCESS = cast("Any", SimpleNamespace(pid=1))


async def of_stream(sock: socket.socket) -> dict[str, Any]:
    return await files.Stream(sock, PROCESS).answer()


async def of_peer(sock: socket.socket) -> dict[str, Any]:
    reader, writer = await asyncio.open_connection(sock=sock)
    try:
        return await files._Peer(reader, writer, PROCESS).answer()
    finally:
        writer.transport.abort()


Answered = Callable[[socket.socket], Awaitable[dict[str, Any]]]


@pytest.mark.parametrize("answered", [of_stream, of_peer])
@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(b"{", id="no JSON"),
        pytest.param(b"\xff", id="no text"),
        pytest.param(b"[]", id="no object"),
        pytest.param(b'{"a":' + b"[" * 60_000, id="nested without an end"),
        pytest.param(b'{"a": ' + b"1" * 5000 + b"}", id="too long a number"),
        pytest.param(None, id="larger than any"),
    ],
)
async def test_an_answer_that_makes_no_sense_is_the_sandboxs_fault(
    answered: Answered, answer: bytes | None
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)  # noqa: FBT003 - positional-only
        # Of the largest, not even the beginning is waited for.
        length = 2**32 - 1 if answer is None else len(answer)
        theirs.sendall(LENGTH.pack(length) + (answer or b""))
        async with asyncio.timeout(60):
            with pytest.raises(Exhausted, match="not valid"):
                await answered(ours)


@pytest.mark.parametrize("answered", [of_stream, of_peer])
async def test_a_refusal_is_what_it_says_with_whatever_else_it_has(answered: Answered) -> None:
    ours, theirs = socket.socketpair()
    refusal = {"code": "no_space", "detail": "There is none.", "self": 1, "extra": 2}
    body = json.dumps(refusal).encode()
    with ours, theirs:
        ours.setblocking(False)  # noqa: FBT003 - positional-only
        theirs.sendall(LENGTH.pack(len(body)) + body)
        async with asyncio.timeout(60):
            with pytest.raises(HostError) as raised:
                await answered(ours)
    assert isinstance(raised.value, NoSpace)
    assert raised.value.to_wire() == refusal


@pytest.mark.parametrize(("operation", "sender"), [("read", "read"), ("read_part", "sendfile")])
def test_a_file_that_cannot_be_read_on_is_cut_short_and_nothing_is_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, sender: str
) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(3 * CHUNK_BYTES))
    real, calls = getattr(os, sender), iter(range(9))

    def failing(*arguments: Any) -> Any:
        if next(calls):
            raise OSError(errno.EIO, "Input/output error")
        return real(*arguments[:-1], 1000)

    monkeypatch.setattr(os, sender, failing)
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            # Whoever refuses waits until that is read.
            ours.shutdown(socket.SHUT_WR)
            inside_files.perform(operation, {"path": str(file)}, theirs)
        with ours.makefile("rb") as answer:
            (length,) = LENGTH.unpack(answer.read(LENGTH.size))
            assert "stat" in json.loads(answer.read(length))
            assert answer.read() == bytes(1000)
