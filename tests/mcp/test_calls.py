"""Calls that last: signs of life, and how they are cancelled."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from django.conf import settings

from hostruntime.wire.commands import Exec, ExecFrame
from orkestr_console.mcp import cancelling, progress
from tests.fakes.host import FakeHost
from tests.mcp.conftest import URL, Connect, http_client
from tests.mcp.test_tools import done

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("host")]


class Hanging:
    """A host whose commands end when the test says so."""

    def __init__(self, host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = asyncio.Event()
        self.go_on = asyncio.Event()
        self.ended: list[str] = []
        self.seconds: list[float | None] = []
        monkeypatch.setattr(host, "exec_frames", self.frames)

    async def frames(self, _: str, request: Exec) -> AsyncIterator[ExecFrame]:
        self.seconds.append(request.timeout_seconds)
        try:
            yield ExecFrame("started", pid=7)
            self.begun.set()
            await self.go_on.wait()
            yield ExecFrame("exited", code=0, duration_ms=1)
        finally:
            self.ended.append("ended" if self.go_on.is_set() else "stopped")


@pytest.fixture
def hanging(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> Hanging:
    return Hanging(host, monkeypatch)


async def eventually(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def test_whoever_asks_for_progress_gets_signs_of_life(
    connect: Connect, key: str, hanging: Hanging, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "HEARTBEAT_SECONDS", 0.02)
    ticks: list[float] = []

    def clock() -> float:
        ticks.append(len(ticks))
        return ticks[-1]

    monkeypatch.setattr(progress, "monotonic", clock)
    heard: list[tuple[float, str | None]] = []

    async def note(progress: float, total: float | None, message: str | None) -> None:
        heard.append((progress, message))

    async with connect(key) as client:
        box = (await done(client, "create_sandbox", template="debian-12"))["id"]
        arguments = {"sandbox_id": box, "command": "slow"}
        call = client.call_tool("exec", arguments, progress_callback=note)
        running = asyncio.create_task(call)
        await hanging.begun.wait()
        await eventually(lambda: len(ticks) > 4)
        hanging.go_on.set()
        assert not (await running).is_error
        assert len(heard) > 2
        counted = len(ticks)
        assert [at for at, _ in heard] == sorted({at for at, _ in heard})
        assert all(said and said.startswith("Still running after ") for _, said in heard)
        # Less than the minute after which clients give up.
        assert hanging.seconds == [50]
        await done(client, "exec", **arguments)
        # Without a progress token nothing is counted at all.
        assert len(ticks) == counted


@pytest.mark.parametrize("mode", ["legacy", "2026-07-28"])
async def test_a_cancelled_call_ends_its_command(
    connect: Connect, key: str, hanging: Hanging, mode: str
) -> None:
    async with connect(key, mode=mode) as client, connect(key, mode=mode) as other:
        box = (await done(client, "create_sandbox", template="debian-12"))["id"]
        arguments = {"sandbox_id": box, "command": "slow"}
        # Of the same token, and numbered in the same way.
        await done(other, "list_templates")
        kept = asyncio.create_task(other.call_tool("exec", arguments))
        await hanging.begun.wait()
        hanging.begun.clear()
        call = asyncio.create_task(client.call_tool("exec", arguments))
        await hanging.begun.wait()
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await eventually(lambda: hanging.ended == ["stopped"])
        assert not kept.done()
        hanging.go_on.set()
        assert not (await kept).is_error
        assert (await done(client, "list_templates"))["templates"] == []


async def test_another_process_is_told_of_it(
    connect: Connect, key: str, hanging: Hanging, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the notification had come to a process that doesn't have the call."""
    honest, misses = cancelling.cancel_here, []

    def not_here_at_first(named: str) -> bool:
        misses.append(named)
        return len(misses) > 1 and honest(named)

    monkeypatch.setattr(cancelling, "cancel_here", not_here_at_first)
    async with connect(key, mode="legacy") as client:
        box = (await done(client, "create_sandbox", template="debian-12"))["id"]
        arguments = {"sandbox_id": box, "command": "slow"}
        call = asyncio.create_task(client.call_tool("exec", arguments))
        await hanging.begun.wait()
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await eventually(lambda: hanging.ended == ["stopped"])
        assert len(set(misses)) == 1


async def test_too_large_a_call_is_refused_as_json_rpc(connect: Connect, key: str) -> None:
    headers = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
    async with http_client(key, **headers) as http:
        answer = await http.post(URL, content=b"x" * (settings.LARGEST_BODY + 1))
    assert answer.status_code == 413
    told = json.loads(answer.text)
    assert (told["jsonrpc"], told["id"], told["error"]["code"]) == ("2.0", None, -32600)
    assert told["error"]["data"]["code"] == "payload_too_large"
