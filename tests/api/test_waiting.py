"""Commands that take long: what they wait with, which is counted, and what becomes of them."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.db import connections
from django.test import Client

from hostruntime.wire.commands import ExecResult
from orkestr_console.accounts.models import AuditEntry, Plan
from orkestr_console.http.handler import Handler
from orkestr_console.http.threads import MAX_PARTS
from tests.api.test_sandboxes_exec import exec_scope
from tests.fakes.host import FakeHost
from tests.fakes.watched import in_use

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("plans")]

COMMANDS = 300


class LongCommands:
    """A host on which commands run until they are told to end."""

    def __init__(self, host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
        self.running = 0
        self.killed = 0
        self.ending = asyncio.Event()
        monkeypatch.setattr(host, "exec_to_completion", self._run)

    async def _run(self, *_: object) -> ExecResult:
        self.running += 1
        try:
            await self.ending.wait()
        except asyncio.CancelledError:
            self.killed += 1
            raise
        finally:
            self.running -= 1
        return ExecResult(0, None, b"over\n", b"", 5000)


class Caller:
    """One client of the server, and what it is told."""

    def __init__(self, handler: Handler, box: str, key: str) -> None:
        body = json.dumps({"command": "sleep 5"}).encode()
        self._messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._messages.put_nowait({"type": "http.request", "body": body})
        self.told: list[dict[str, Any]] = []
        served = handler(exec_scope(box, key, body), self._messages.get, self._hear)
        self.served = asyncio.create_task(served)

    async def _hear(self, message: dict[str, Any]) -> None:
        self.told.append(message)

    def leave(self) -> None:
        """Disconnect."""
        self._messages.put_nowait({"type": "http.disconnect"})


@pytest.fixture
def box(api: Client, host: FakeHost) -> str:
    Plan.objects.update(api_requests_per_minute=100_000)
    created = api.post("/v1/sandboxes", {"template": "debian-12"}, "application/json")
    return str(created.json()["id"])


@pytest.fixture(autouse=True)
async def closed() -> AsyncIterator[None]:
    """Asynchronous queries keep a connection of asgiref's own thread, which nobody else closes."""
    yield
    await sync_to_async(connections.close_all)()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


def request_threads() -> int:
    return sum(thread.name == "request" for thread in threading.enumerate())


async def test_they_wait_without_a_thread_or_a_connection(
    box: str, key: str, host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands, handler, before = LongCommands(host, monkeypatch), Handler(), request_threads()
    callers = [Caller(handler, box, key) for _ in range(COMMANDS)]
    await until(lambda: commands.running == COMMANDS)
    assert request_threads() - before <= MAX_PARTS
    assert in_use() <= 1  # the test's own
    commands.ending.set()
    await asyncio.gather(*(caller.served for caller in callers))
    assert {caller.told[0]["status"] for caller in callers} == {200}
    assert all(json.loads(caller.told[1]["body"])["stdout"] == "over\n" for caller in callers)
    recorded = AuditEntry.objects.filter(action="sandbox.exec", data__exit_code=0)
    assert await recorded.acount() == COMMANDS


async def test_those_whose_client_leaves_are_killed_and_recorded(
    box: str, key: str, host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands, handler = LongCommands(host, monkeypatch), Handler()
    callers = [Caller(handler, box, key) for _ in range(COMMANDS)]
    await until(lambda: commands.running == COMMANDS)
    for caller in callers:
        caller.leave()
    await asyncio.gather(*(caller.served for caller in callers))
    assert (commands.killed, commands.running) == (COMMANDS, 0)
    assert not any(caller.told for caller in callers)
    left = AuditEntry.objects.filter(data={"ended": "the client went away"})
    assert await left.acount() == COMMANDS
