"""Nobody who asks a host, or waits for anything else that is slow, holds a database connection.

Every address of REST and the console is called here, every tool, every socket and every task, with
a host that looks into the pool whenever it is asked. As many slow calls as the pool has connections
would else be all that the server can do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from django.db import connection, transaction

from hostruntime.wire.commands import ExecFrame
from orkestr_console.accounts.models import Team, User
from orkestr_console.asgi import application
from orkestr_console.core import hosts
from orkestr_console.core.postgres import ConnectionHeldError
from sandboxes_app import tasks as sandbox_tasks
from sandboxes_app.models import Sandbox
from templates_app import tasks as template_tasks
from templates_app.models import Template
from tests.api.test_access_table import CONSOLE, REST, Row, World, answer_of
from tests.api.test_access_table import world as world
from tests.fakes.fixtures import run_queue
from tests.fakes.host import FakeHost
from tests.fakes.watched import WatchedHost, in_use
from tests.receiving import loopback_permitted as loopback_permitted

# What a person or program asks of a host through REST and the console, and what each must ask.
ASKING = {
    "POST v1/templates": "bases",
    "GET v1/templates/<template>/usage": "image_usage",
    "POST v1/sandboxes": "create_sandbox",
    "GET v1/sandboxes/limits": "default_domains",
    "DELETE v1/sandboxes/snapshots/<snapshot>": "delete_snapshot",
    "POST v1/sandboxes/<sandbox>/snapshots": "create_snapshot",
    "DELETE v1/sandboxes/<sandbox>": "delete_sandbox",
    "POST v1/sandboxes/<sandbox>/timeout": "set_deadline",
    "POST v1/sandboxes/<sandbox>/pause": "pause_sandbox",
    "POST v1/sandboxes/<sandbox>/exec": "exec_to_completion",
    "GET v1/sandboxes/<sandbox>/files?path=/workspace/there": "read_path",
    "POST v1/sandboxes/<sandbox>/files": "write_file",
    "DELETE v1/sandboxes/<sandbox>/files?path=/workspace/there": "delete_path",
    "POST v1/sandboxes/<sandbox>/files/mkdir": "mkdir",
    "POST v1/sandboxes/<sandbox>/files/move": "move",
    "GET v1/sandboxes/<sandbox>/files/stat?path=/workspace/there": "stat",
    "POST v1/sandboxes/<sandbox>/files/batch": "write_file",
    "POST templates/new/": "bases",
    "POST sandboxes/new/": "create_sandbox",
    "GET sandboxes/of-template/<template>/": "image_usage",
    "POST sandboxes/<sandbox>/exec/": "exec_to_completion",
    "POST sandboxes/<sandbox>/pause/": "pause_sandbox",
    "POST sandboxes/<sandbox>/terminate/": "delete_sandbox",
}


@pytest.fixture
def committed(plans: None) -> None:
    """Rows that are really there: the transaction around a test would hold a connection itself."""


@pytest.fixture
def watched(
    committed: None, world: World, host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> Iterator[WatchedHost]:
    found = WatchedHost(host)
    monkeypatch.setattr(hosts, "host_client", lambda socket: found)
    monkeypatch.setattr(hosts, "async_host_client", lambda socket: found)
    # To sign in takes a connection, of the test's own thread.
    assert all(world.clients[caller] for caller in ("token", "owner"))
    connection.close()
    assert in_use() == 0
    yield found
    assert found.held == [], "asked with a database connection in hand"


def caller_of(row: Row) -> str:
    return "token" if row.route.startswith("v1/") else "owner"


@pytest.mark.parametrize("row", [*REST, *CONSOLE], ids=str)
def test_no_address_asks_a_host_with_a_connection_in_hand(
    watched: WatchedHost, world: World, row: Row
) -> None:
    answer = answer_of(row, world, caller_of(row))
    assert answer.status_code < 500
    if (needed := ASKING.get(str(row))) is not None and answer.status_code < 400:
        assert needed in watched.asked


def test_the_rows_that_ask_are_among_the_addresses() -> None:
    assert set(ASKING) <= {str(row) for row in (*REST, *CONSOLE)}


def test_a_streamed_command_is_read_with_nothing_in_hand(
    watched: WatchedHost, world: World, host: FakeHost
) -> None:
    host.frames["true"] = [ExecFrame("started", pid=1), ExecFrame("exited", code=0, duration_ms=1)]
    address = f"/v1/sandboxes/{world.ids['sandbox']}/exec"
    body = {"command": "true", "stream": True}
    answer = world.clients["token"].post(address, body, content_type="application/json")
    assert answer.status_code == 200
    assert "exec_frames, the next piece" in watched.asked


@pytest.mark.parametrize(
    "task", [sandbox_tasks.tidy, template_tasks.reconcile_images, template_tasks.drive_builds]
)
def test_no_task_by_the_clock_does(watched: WatchedHost, task: object) -> None:
    assert callable(task)
    task()


def test_no_build_is_followed_with_a_connection_in_hand(watched: WatchedHost, world: World) -> None:
    """Not even between two of its events, which may be an hour apart."""
    run_queue()
    assert Template.objects.get(pk=world.ids["template"]).is_ready
    assert "build_events, the next piece" in watched.asked


def test_nothing_that_a_sandbox_which_is_gone_sets_off_does(
    watched: WatchedHost, world: World, host: FakeHost
) -> None:
    host.end(world.ids["sandbox"], "exited")
    address = f"/v1/sandboxes/{world.ids['sandbox']}/exec"
    answer = world.clients["token"].post(address, {"command": "true"}, "application/json")
    assert answer.status_code == 409
    sandbox_tasks.release_sandbox(world.ids["sandbox"])
    template_tasks.forget_image(Template.objects.get(pk=world.ids["template"]).image_id)
    assert {"sandbox", "delete_sandbox", "delete_image"} <= set(watched.asked)


def test_a_host_cannot_be_asked_inside_of_a_transaction(
    committed: None, host: FakeHost, team: Team, alice: User
) -> None:
    with transaction.atomic(), pytest.raises(ConnectionHeldError):
        Sandbox.objects.count()
        hosts.host().bases()
    assert hosts.host().bases()


@pytest.fixture
def closed(plans: None, key: str) -> str:
    """A token, with nothing held by who made it."""
    connection.close()
    return key


@pytest.mark.parametrize("path", ["/v1/templates", "/v1/sandboxes/limits", "/sign-in/"])
async def test_nothing_is_held_while_an_answer_is_sent(
    host: FakeHost, closed: str, path: str
) -> None:
    """Which takes as long as whoever reads it."""
    headers = [(b"host", b"testserver"), (b"authorization", f"Bearer {closed}".encode())]
    scope = {"type": "http", "method": "GET", "path": path, "query_string": b""}
    asked = iter([{"type": "http.request", "body": b"", "more_body": False}])
    held: dict[str, int] = {}

    async def receive() -> dict[str, Any]:
        if (message := next(asked, None)) is not None:
            return message
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: dict[str, Any]) -> None:
        held[message["type"]] = in_use()

    # What is an event here is one to every server.
    app: Any = application
    await app({**scope, "headers": headers}, receive, send)
    assert held == {"http.response.start": 0, "http.response.body": 0}
