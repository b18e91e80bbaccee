"""The agent's responses: streams of lines, and callers that go away while they speak."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Any
from unittest.mock import MagicMock

import pytest

from hostruntime.agent import responses
from hostruntime.agent.corking import MAX_HELD_BYTES, CorkedTransport
from hostruntime.agent.responses import NdjsonResponse
from hostruntime.agent.routes import application


async def test_a_caller_killed_while_it_sends_is_no_defect(
    caplog: pytest.LogCaptureFixture,
) -> None:
    host = MagicMock()
    arriving = iter([{"type": "http.request", "body": b"{", "more_body": True}])
    sent: list[Any] = []

    async def receive() -> Any:
        return next(arriving, {"type": "http.disconnect"})

    async def send(message: Any) -> None:
        sent.append(message)

    path = "/sandboxes/sbx_one/pause"
    scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b""}
    with caplog.at_level(logging.INFO):
        await application(host)(scope, receive, send)
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "disconnected" in caplog.text
    host.sandboxes.pause.assert_not_called()


# Streams of lines ------------------------------------------------------------------------------


class Client:
    """An ASGI client that may take its time, and may go away."""

    def __init__(self, *, slow: bool = False) -> None:
        self.parts: list[tuple[bytes, bool]] = []
        self.gone = asyncio.Event()
        self.arrived = asyncio.Event()
        self._slow = slow

    async def receive(self) -> dict[str, str]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.body":
            self.parts.append((message["body"], message["more_body"]))
            self.arrived.set()
        if self._slow:
            await asyncio.sleep(0.02)

    async def get(self, lines: AsyncGenerator[bytes, None]) -> None:
        await NdjsonResponse(lines)({}, self.receive, self.send)

    @property
    def body(self) -> bytes:
        return b"".join(body for body, _ in self.parts)


async def test_a_stream_that_is_over_at_once_is_sent_in_one_part() -> None:
    async def lines() -> AsyncGenerator[bytes, None]:
        yield b"a\n"
        await asyncio.sleep(0)
        yield b"b\n"

    client = Client()
    await client.get(lines())
    assert client.parts == [(b"a\nb\n", False)]


async def test_a_line_is_not_held_until_the_next_one() -> None:
    client = Client()

    async def lines() -> AsyncGenerator[bytes, None]:
        yield b"a\n"
        await client.arrived.wait()
        yield b"b\n"

    await asyncio.wait_for(client.get(lines()), 20)
    assert client.parts == [(b"a\n", True), (b"b\n", False)]


async def test_a_stream_that_ends_while_a_part_is_sent_is_ended_too() -> None:
    async def lines() -> AsyncGenerator[bytes, None]:
        yield b"a\n"
        await client.arrived.wait()
        yield b"b\n"

    client = Client(slow=True)
    await client.get(lines())
    assert client.parts == [(b"a\n", True), (b"b\n", False)]


async def test_silence_is_filled_with_empty_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "KEEP_ALIVE_SECONDS", 0.01)
    client = Client()

    async def lines() -> AsyncGenerator[bytes, None]:
        yield b"a\n"
        while client.body.count(b"\n\n") < 1:
            await asyncio.sleep(0.01)
        yield b"b\n"

    await asyncio.wait_for(client.get(lines()), 20)
    assert client.body.split() == [b"a", b"b"]


async def test_a_fast_writer_waits_for_a_slow_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "_MAX_PENDING_BYTES", 1000)
    ahead: list[int] = []
    client, written = Client(slow=True), 0

    async def lines() -> AsyncGenerator[bytes, None]:
        nonlocal written
        for _ in range(100):
            written += 100
            ahead.append(written - len(client.body))
            yield bytes(100)

    await client.get(lines())
    assert len(client.body) == 10_000
    assert max(ahead) <= 2100, "what is being sent, what is pending, and a line"


async def test_a_client_that_goes_away_ends_the_stream() -> None:
    ended: list[str] = []

    async def lines() -> AsyncGenerator[bytes, None]:
        try:
            yield b"a\n"
            await asyncio.sleep(600)
        finally:
            await asyncio.sleep(0)
            ended.append("cleaned up")

    client = Client()
    serving = asyncio.ensure_future(client.get(lines()))
    await client.arrived.wait()
    client.gone.set()
    await asyncio.wait_for(serving, 20)
    assert ended == ["cleaned up"]
    assert [more for _, more in client.parts] == [True]


async def test_a_stream_that_fails_is_not_ended_as_if_it_were_complete() -> None:
    async def lines() -> AsyncGenerator[bytes, None]:
        yield b"a\n"
        raise RuntimeError("words")

    client = Client()
    with pytest.raises(RuntimeError, match="words"):
        await client.get(lines())
    assert client.parts == [(b"a\n", True)]


async def test_what_is_written_together_is_one_write() -> None:
    transport = MagicMock()
    corked = CorkedTransport(transport, asyncio.get_running_loop())
    corked.write(b"head")
    corked.write(b"body")
    assert transport.write.call_count == 0
    await asyncio.sleep(0)
    transport.write.assert_called_once_with(b"headbody")
    corked.write(b"last")
    corked.close()
    assert [call[0] for call in transport.mock_calls] == ["write", "write", "close"]
    corked.write(bytes(MAX_HELD_BYTES))
    assert transport.write.call_count == 3, "much is not held, so that it can be refused"
    await asyncio.sleep(0)
    assert transport.write.call_count == 3
    assert corked.is_closing is transport.is_closing
