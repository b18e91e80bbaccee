"""What a call costs: statements, threads and connections, which are counted and not timed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext

from orkestr_console.accounts import admission
from orkestr_console.accounts.models import ApiToken, Team
from orkestr_console.core.postgres import check_connection, connection_arguments
from orkestr_console.http.handler import Handler
from tests.conftest import MakeKey
from tests.fakes.host import FakeHost

# psycopg parses a statement anew each time that is longer than this (psycopg._queries).
LONGEST_REMEMBERED = 4096


@contextmanager
def counted() -> Iterator[list[str]]:
    """The statements that are run in the block, as they were."""
    statements: list[str] = []
    with CaptureQueriesContext(connection) as captured:
        yield statements
    statements += [query["sql"] for query in captured.captured_queries]


@pytest.fixture
def sandbox(api: Client, host: FakeHost) -> str:
    created = api.post("/v1/sandboxes", {"template": "debian-12"}, "application/json")
    return str(created.json()["id"])


@pytest.fixture
def used(api: Client) -> None:
    """The token has been used just now, which is written down once a minute, and is known."""
    for _ in range(2):
        api.get("/v1/sandboxes")


@pytest.mark.usefixtures("used")
def test_a_sandbox_is_read_with_it(api: Client, sandbox: str) -> None:
    with counted() as statements:
        assert api.get(f"/v1/sandboxes/{sandbox}").status_code == 200
    assert len(statements) == 1, statements


@pytest.mark.usefixtures("used")
def test_a_command_takes_two(api: Client, sandbox: str) -> None:
    """To be let in, with the sandbox, and to put it on record."""
    with counted() as statements:
        answer = api.post(f"/v1/sandboxes/{sandbox}/exec", {"command": "true"}, "application/json")
    assert answer.status_code == 200, answer.content
    assert len(statements) == 2, statements


def test_psycopg_remembers_the_statement() -> None:
    assert len(admission.admission_sql().encode()) <= LONGEST_REMEMBERED


def test_what_is_read_of_a_token_is_what_its_row_has(team: Team, make_key: MakeKey) -> None:
    make_key(team)
    row = ApiToken.objects.select_related("team__plan", "created_by").get()
    found = admission.admit(row.lookup, row.digest)
    assert found is not None
    assert found.valid
    with counted() as statements:
        for of_admission, of_row in (
            (found.token, row),
            (found.token.team, row.team),
            (found.token.team.plan, row.team.plan),
        ):
            for field in of_row._meta.concrete_fields:
                name = field.attname
                assert getattr(of_admission, name) == getattr(of_row, name), name
        assert not hasattr(found.token.team, "limits")
        assert not hasattr(found.token.team, "agreement")
    assert statements == []


def test_only_the_token_itself_is_counted(team: Team, make_key: MakeKey) -> None:
    make_key(team)
    row = ApiToken.objects.get()
    refused = admission.admit(row.lookup, "0" * 64)
    assert refused is not None
    assert (refused.valid, refused.counted) == (False, False)
    assert not hasattr(row, "bucket")


async def test_requests_share_a_few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[threading.Thread] = []
    start = threading.Thread.start

    def counting(thread: threading.Thread) -> None:
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", counting)
    handler: Any = Handler()
    for _ in range(30):
        await ask(handler)
    assert len(started) == 1


async def ask(handler: Any) -> None:
    """One request without a token, whose client waits for the answer."""
    messages = iter([{"type": "http.request", "body": b"", "more_body": False}])
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if (message := next(messages, None)) is not None:
            return message
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/v1/sandboxes", "query_string": b""}
    await handler({**scope, "headers": [(b"host", b"testserver")]}, receive, send)
    assert sent[0]["status"] == 401


def test_an_idle_connection_is_good_without_a_statement_and_a_closed_one_is_not(db: None) -> None:
    with psycopg.connect(**connection_arguments("test")) as checked:
        before = statements_of(checked)
        check_connection(checked)
        assert statements_of(checked) == before
        end(checked)
        with pytest.raises(psycopg.OperationalError):
            check_connection(checked)


def statements_of(other: psycopg.Connection[Any]) -> object:
    """When a connection last began a statement, as the server knows."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT query_start FROM pg_stat_activity WHERE pid = %s", [other.info.backend_pid]
        )
        return cursor.fetchone()


def end(other: psycopg.Connection[Any]) -> None:
    """Have the server close a connection, and wait until it has."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_terminate_backend(%s, 5000)", [other.info.backend_pid])
