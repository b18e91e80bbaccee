"""Calls that wait for the host, or for their team's turn: with what, which is counted."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.db import connections
from django.test import Client

from orkestr_console.accounts import turns
from orkestr_console.accounts.actor import Actor
from orkestr_console.accounts.models import AuditEntry, Plan, Team
from orkestr_console.accounts.turns import taken, turn, wait
from orkestr_console.core.errors import Asleep
from orkestr_console.core.hosts import run_here
from orkestr_console.http.handler import Handler
from orkestr_console.http.threads import MAX_PARTS, MAX_TURNS
from sandboxes_app.models import Sandbox
from sandboxes_app.services import waking
from tests.conftest import MakeKey
from tests.fakes.host import FakeHost
from tests.fakes.watched import in_use

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("plans")]

CALLERS = 100
LONG = 60.0
BODY = {"template": "debian-12", "network": "off"}


class SlowHost:
    """A host that answers one of its calls only when it is told to, however it is asked."""

    def __init__(self, host: FakeHost, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked = 0
        self._name, self._method, self._ask = name, getattr(host, name), host.ask
        self._here, self._on_event_loop = threading.Event(), asyncio.Event()
        monkeypatch.setattr(host, name, self._answer_here)
        monkeypatch.setattr(host, "ask", self._answer)

    def go_on(self) -> None:
        self._here.set()
        self._on_event_loop.set()

    def _answer_here(self, *words: Any, **options: Any) -> Any:
        if not self._on_event_loop.is_set():
            self.asked += 1
        assert self._here.wait(LONG)
        return self._method(*words, **options)

    async def _answer(self, name: str, *words: Any, **options: Any) -> Any:
        if name == self._name and not self._on_event_loop.is_set():
            self.asked += 1
            await self._on_event_loop.wait()
        return await self._ask(name, *words, **options)


class Caller:
    """One client of the server, and what it is told."""

    def __init__(self, handler: Handler, key: str, method: str, path: str, body: Any) -> None:
        content = b"" if body is None else json.dumps(body).encode()
        self._messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._messages.put_nowait({"type": "http.request", "body": content})
        self.told: list[dict[str, Any]] = []
        path, _, query = path.partition("?")
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": query.encode(),
            "headers": [
                (b"host", b"localhost"),
                (b"authorization", f"Bearer {key}".encode()),
                (b"content-type", b"application/json"),
                (b"content-length", str(len(content)).encode()),
            ],
        }
        self.served = asyncio.create_task(handler(scope, self._messages.get, self._hear))

    async def _hear(self, message: dict[str, Any]) -> None:
        self.told.append(message)

    def leave(self) -> None:
        """Disconnect."""
        self._messages.put_nowait({"type": "http.disconnect"})


@pytest.fixture
def box(api: Client, host: FakeHost) -> str:
    Plan.objects.update(api_requests_per_minute=100_000, max_concurrent_sandboxes=1000)
    created = str(api.post("/v1/sandboxes", BODY, "application/json").json()["id"])
    host.write_file(created, "/workspace/there", b"x")
    return created


@pytest.fixture(autouse=True)
async def closed() -> AsyncIterator[None]:
    """Asynchronous queries keep a connection of asgiref's own thread, which nobody else closes."""
    yield
    await sync_to_async(connections.close_all)()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LONG):
        while not condition():
            await asyncio.sleep(0.01)


def request_threads() -> int:
    return sum(thread.name == "request" for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("asked", "method", "path", "body"),
    [
        ("create_sandbox", "POST", "/v1/sandboxes", BODY),
        ("set_deadline", "POST", "/v1/sandboxes/{box}/timeout", {"timeout_seconds": 60}),
        ("read_path", "GET", "/v1/sandboxes/{box}/files?path=/workspace/there", None),
        ("stat", "GET", "/v1/sandboxes/{box}/files/stat?path=/workspace/there", None),
        ("write_file", "POST", "/v1/sandboxes/{box}/files", {"path": "/tmp/a", "content": "YQ=="}),
        ("mkdir", "POST", "/v1/sandboxes/{box}/files/mkdir", {"path": "/tmp/d"}),
    ],
)
async def test_a_call_waits_without_a_thread_or_a_connection(
    box: str,
    key: str,
    host: FakeHost,
    monkeypatch: pytest.MonkeyPatch,
    asked: str,
    method: str,
    path: str,
    body: Any,
) -> None:
    slow, handler, before = SlowHost(host, asked, monkeypatch), Handler(), request_threads()
    path = path.format(box=box)
    callers = [Caller(handler, key, method, path, body) for _ in range(CALLERS)]
    await until(lambda: slow.asked == CALLERS)
    assert request_threads() - before <= MAX_PARTS + MAX_TURNS
    assert in_use() <= 1  # the test's own
    slow.go_on()
    await asyncio.gather(*(caller.served for caller in callers))
    assert {caller.told[0]["status"] for caller in callers} <= {200, 201, 204}


@pytest.mark.parametrize("path", ["pause", "snapshots", ""])
async def test_one_of_each_other_kind_does_too(
    box: str, key: str, host: FakeHost, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    names = {"pause": "pause_sandbox", "snapshots": "create_snapshot", "": "delete_sandbox"}
    slow, handler = SlowHost(host, names[path], monkeypatch), Handler()
    address, method = f"/v1/sandboxes/{box}/{path}".rstrip("/"), "POST" if path else "DELETE"
    caller = Caller(handler, key, method, address, {} if path == "snapshots" else None)
    await until(lambda: slow.asked == 1)
    await until(lambda: idle(handler))
    assert in_use() <= 1
    slow.go_on()
    await caller.served
    assert caller.told[0]["status"] < 300


def idle(handler: Handler) -> bool:
    """Whether no thread has anything to do."""
    pools = (handler._threads.parts, handler._threads.views)
    return all(len(pool._idle) == pool._started for pool in pools)


async def test_what_has_begun_is_done_although_its_client_leaves(
    box: str, key: str, host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, handler = SlowHost(host, "create_sandbox", monkeypatch), Handler()
    callers = [Caller(handler, key, "POST", "/v1/sandboxes", BODY) for _ in range(CALLERS)]
    await until(lambda: slow.asked == CALLERS)
    for caller in callers:
        caller.leave()
    await asyncio.gather(*(caller.served for caller in callers))
    assert not any(caller.told for caller in callers)
    slow.go_on()
    running = Sandbox.objects.filter(status="running", driver="")
    async with asyncio.timeout(LONG):
        while await running.acount() < CALLERS + 1:
            await asyncio.sleep(0.05)
    assert await AuditEntry.objects.filter(action="sandbox.create").acount() == CALLERS + 1


async def test_another_team_is_served_while_one_waits_for_its_turn(
    box: str, key: str, team: Team, other_team: Team, make_key: MakeKey
) -> None:
    handler = Handler()
    other_key = await sync_to_async(make_key)(other_team)
    with turn(team.pk):
        callers = [Caller(handler, key, "POST", "/v1/sandboxes", BODY) for _ in range(CALLERS)]
        await until(lambda: waiting_for(team.pk) == CALLERS)
        # With every thread in a queue for the team, nobody would be left to answer this.
        other = Caller(handler, other_key, "GET", "/v1/sandboxes", None)
        await other.served
        assert other.told[0]["status"] == 200
        assert not any(caller.told for caller in callers)
    await asyncio.gather(*(caller.served for caller in callers))
    assert {caller.told[0]["status"] for caller in callers} == {201}


def waiting_for(team_id: str) -> int:
    return len(turns._turns._waiting.get(team_id, ()))


def test_whoever_gives_up_is_passed_over() -> None:
    with turn("a team"):
        left, patient = wait("a team"), wait("a team")
        next(left)
        place = next(patient)
        left.close()
    assert isinstance(place, Future)
    assert place.done()
    assert next(patient, None) is None
    with taken("a team"):
        pass
    run_here(wait("a team"))
    with taken("a team"):
        pass


@pytest.fixture
def sleeper(box: str, api: Client) -> str:
    """A paused sandbox that wakes when it is used."""
    body = {**BODY, "auto_resume": True}
    made = str(api.post("/v1/sandboxes", body, "application/json").json()["id"])
    assert api.post(f"/v1/sandboxes/{made}/pause").status_code == 200
    return made


def counting(looks: list[str]) -> Callable[[Actor, Sandbox], Asleep]:
    """Tells that a sandbox is asleep, and notes whom it told of."""
    asleep = waking.asleep

    def told(actor: Actor, sandbox: Sandbox) -> Asleep:
        looks.append(sandbox.pk)
        return asleep(actor, sandbox)

    return told


async def test_all_that_find_a_sandbox_asleep_wait_for_one_to_wake_it(
    sleeper: str, key: str, host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, handler, before = (
        SlowHost(host, "resume_sandbox", monkeypatch),
        Handler(),
        request_threads(),
    )
    looks: list[str] = []
    monkeypatch.setattr(waking, "asleep", counting(looks))
    path = f"/v1/sandboxes/{sleeper}/files/stat?path=/workspace"
    first = Caller(handler, key, "GET", path, None)
    await until(lambda: slow.asked == 1)
    callers = [Caller(handler, key, "GET", path, None) for _ in range(CALLERS)]
    # The one that began it may leave: the others get what they wait for.
    first.leave()
    await asyncio.gather(first.served, return_exceptions=True)
    await until(lambda: looks.count(sleeper) == CALLERS + 1)
    await until(lambda: idle(handler))
    assert request_threads() - before <= MAX_PARTS
    assert in_use() <= 1
    slow.go_on()
    await asyncio.gather(*(caller.served for caller in callers))
    assert {caller.told[0]["status"] for caller in callers} == {200}
    assert slow.asked == 1
