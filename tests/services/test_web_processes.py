"""Web processes that share a port: one is killed, hangs or stops, and the others' clients go on."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest
from django.conf import settings
from django.db import connections
from django.test import Client

from hostruntime.host.patience import process_tree
from orkestr_console.accounts.actor import Actor
from orkestr_console.accounts.models import Team
from sandboxes_app import services as sandboxes
from sandboxes_app.specs import SandboxSpec
from tests.fakes.host import FakeHost
from tests.processes import open_files
from tests.serving import Serving
from tests.stack import wait_for

PROCESSES = 2
CLIENTS = 8
# So many that of those who come later, chance sends neither process LEAST in a hundred: one that
# decides by a coin's flip manages both in one attempt of a hundred thousand.
HELD, LEAST, ATTEMPTS = 48, 71, 5
# A busy machine lets one that begins wait for long; who is to be found hanging should not.
PATIENT, STALE_SECONDS = 60, 10
MOST_PAGES = 64
ESTABLISHED, CLOSE_WAIT = "01", "08"

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("plans")]


@pytest.fixture
def serving(request: pytest.FixtureRequest, django_db_setup: None) -> Iterator[Serving]:
    with tempfile.TemporaryDirectory(prefix="orkestr-web-") as var:
        server = Serving(
            Path(var),
            settings.DATABASES["default"],
            ORKESTR_WEB_PROCESSES=str(PROCESSES),
            ORKESTR_WORKER_STALE=str(getattr(request, "param", PATIENT)),
            # However busy this machine is, who has fewer clients is quick enough for the next.
            ORKESTR_PATIENCE="30",
        )
        try:
            wait_for(lambda: len(children(server)) == PROCESSES, 60, server.log)
            yield server
        finally:
            server.close()


def children(serving: Serving) -> set[int]:
    """The web processes, without the one that watches them."""
    return set(process_tree(serving.process.pid)) - {serving.process.pid}


def server_ends(serving: Serving) -> dict[int, str]:
    """The inodes of the server's ends of connections, by the client's port (proc(5), net/tcp)."""
    found = {}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        local, remote, state, *_, inode = line.split()[1:10]
        own, port = (int(end.split(":")[1], 16) for end in (local, remote))
        if own == serving.port and state in {ESTABLISHED, CLOSE_WAIT}:
            found[port] = inode
    return found


def holder(serving: Serving, port: int) -> int:
    """The process that has the server's end of the connection from ``port``."""
    inode = server_ends(serving).get(port)
    for pid in children(serving):
        if f"socket:[{inode}]" in open_files(pid):
            return pid
    raise AssertionError(f"nobody has the connection from {port}")


class Visitor:
    """A client that keeps its connection, and calls until it is told to stop."""

    def __init__(self, serving: Serving, key: str) -> None:
        self._connection = socket.create_connection(("127.0.0.1", serving.port), timeout=30)
        self._call = (
            f"GET /v1/sandboxes HTTP/1.1\r\nHost: 127.0.0.1:{serving.port}\r\n"
            f"Authorization: Bearer {key}\r\n\r\n"
        ).encode()
        self.answered = 0
        self.failed = 0
        self.call()
        self.port = self._connection.getsockname()[1]
        self.process = holder(serving, self.port)

    def call(self) -> None:
        self._connection.sendall(self._call)
        answer = b""
        while not answer.endswith(b"}"):
            piece = self._connection.recv(65536)
            if not piece:
                raise ConnectionResetError
            answer += piece
        assert answer.startswith(b"HTTP/1.1 200 "), answer
        self.answered += 1

    def leave(self) -> None:
        self._connection.close()

    def keep_calling(self, stop: threading.Event) -> None:
        try:
            while not stop.is_set():
                self.call()
        except OSError:
            self.failed += 1
        finally:
            self._connection.close()


def newcomers(serving: Serving, stop: threading.Event, failures: list[object]) -> None:
    """Clients that each make a connection for one call."""
    while not stop.is_set():
        try:
            httpx.get(f"{serving.url}/healthz", trust_env=False, timeout=20).raise_for_status()
        except httpx.TransportError as error:
            # Who was being answered as the process died is told so; not who waited to be accepted.
            failures.append(error)


def under_load(
    serving: Serving, visitors: Sequence[Visitor], meanwhile: Callable[[], None]
) -> list[object]:
    """Do something while everybody calls; the failures of those who come anew."""
    stop, failures = threading.Event(), list[object]()
    calling = [threading.Thread(target=each.keep_calling, args=[stop]) for each in visitors]
    calling.append(threading.Thread(target=newcomers, args=[serving, stop, failures]))
    for thread in calling:
        thread.start()
    time.sleep(0.3)
    meanwhile()
    before = [each.answered for each in visitors]
    wait_for(
        lambda: all(
            each.failed or each.answered > before[number] + 5
            for number, each in enumerate(visitors)
        ),
        60,
        serving.log,
    )
    stop.set()
    for thread in calling:
        thread.join(30)
    return failures


def replaced(serving: Serving, gone: int) -> None:
    """Wait until another process has taken the place of one."""
    wait_for(
        lambda: gone not in children(serving) and len(children(serving)) == PROCESSES,
        60,
        serving.log,
    )


@pytest.fixture
def visitors(serving: Serving, key: str, team: Team) -> list[Visitor]:
    type(team.plan).objects.update(api_requests_per_minute=1_000_000)
    return [Visitor(serving, key) for _ in range(CLIENTS)]


@pytest.mark.usefixtures("plans", "visitors")
def test_each_process_gets_its_part_of_the_clients(serving: Serving, key: str) -> None:
    """One whose clients have left gets those who come, up to what the other has; each in turn.

    But for those that it was too busy to accept in time.
    """
    shares = []
    for _ in range(ATTEMPTS):
        held = [Visitor(serving, key) for _ in range(PROCESSES * HELD)]
        shares.append([share_of_newcomers(serving, key, held, pid) for pid in children(serving)])
        if min(shares[-1]) >= LEAST:
            break
        leave(serving, held)
    else:
        pytest.fail(f"of a hundred newcomers, those with few clients got {shares}")


def share_of_newcomers(serving: Serving, key: str, held: list[Visitor], pid: int) -> int:
    """How many of a hundred newcomers one gets whose clients leave; ``held`` are those of all."""
    leave(serving, [each for each in held if each.process == pid])
    held[:] = [each for each in held if each.process != pid]
    # So few that it has fewer than the other to the last.
    came = [Visitor(serving, key) for _ in range(min(len(held), HELD) - CLIENTS)]
    held += came
    return 100 * [each.process for each in came].count(pid) // max(len(came), 1)


def leave(serving: Serving, visitors: Sequence[Visitor]) -> None:
    """They go, and whoever had them knows."""
    for each in visitors:
        each.leave()
    gone = {each.port for each in visitors}
    wait_for(lambda: not gone & server_ends(serving).keys(), 60, serving.log)


def test_a_killed_one_takes_only_its_own_clients_with_it(
    serving: Serving, visitors: list[Visitor]
) -> None:
    victim = visitors[0].process
    others = [each for each in visitors if each.process != victim]

    def kill() -> None:
        os.kill(victim, signal.SIGKILL)
        replaced(serving, victim)

    failures = under_load(serving, visitors, kill)
    assert [each.failed for each in others] == [0] * len(others)
    assert all(each.failed for each in visitors if each.process == victim)
    assert len(failures) <= 1


@pytest.mark.parametrize("serving", [STALE_SECONDS], indirect=True)
def test_one_that_hangs_is_replaced(serving: Serving, visitors: list[Visitor]) -> None:
    victim = visitors[0].process
    os.kill(victim, signal.SIGSTOP)
    replaced(serving, victim)
    assert "a web process is stuck" in serving.log()
    for visitor in visitors:
        if visitor.process != victim:
            visitor.call()


def test_one_that_is_asked_to_stop_loses_no_newcomer(
    serving: Serving, visitors: list[Visitor]
) -> None:
    victim = visitors[0].process

    def stop() -> None:
        os.kill(victim, signal.SIGTERM)
        replaced(serving, victim)

    assert under_load(serving, visitors, stop) == []


def test_all_end_with_the_one_that_watches_them(serving: Serving) -> None:
    served = children(serving)
    serving.process.kill()
    serving.process.wait()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in served), 20)


def test_all_stop_when_it_is_asked_to(serving: Serving, visitors: list[Visitor]) -> None:
    served = children(serving)
    serving.process.terminate()
    assert serving.process.wait(20) == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in served)


class Badge:
    """The socket of a live page."""

    def __init__(self, serving: Serving, socket_: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket_
        response: Any = socket_._response
        port = response.connection.transport.get_extra_info("sockname")[1]
        self.process = holder(serving, port)

    async def next(self) -> Any:
        async with asyncio.timeout(20):
            return (await self._socket.receive()).data


async def test_live_pages_hear_of_changes_on_whichever_process_they_are(
    serving: Serving, console: Client, console_actor: Actor, host: FakeHost
) -> None:
    cookie = console.cookies[settings.SESSION_COOKIE_NAME].value
    name = settings.SESSION_COOKIE_NAME.replace(str(settings.PORT), str(serving.port))
    headers = {"Cookie": f"{name}={cookie}", "Origin": serving.url}
    async with aiohttp.ClientSession(headers=headers) as session:
        address = f"{serving.url}/ws/sandboxes/"
        badges: list[Badge] = []
        # On a busy machine one may be too slow to accept any of the first ones.
        while len({badge.process for badge in badges}) < PROCESSES:
            assert len(badges) < MOST_PAGES, serving.log()
            badges.append(Badge(serving, await session.ws_connect(address)))
        first = [await badge.next() for badge in badges]
        assert all(first)
        await asyncio.to_thread(create, console_actor)
        assert all([await badge.next() for badge in badges])


def create(actor: Actor) -> None:
    """A sandbox appears, made by a process that serves nobody."""
    sandboxes.create_sandbox(actor, SandboxSpec(template="debian-12"))
    connections.close_all()
