"""How many statements, threads and calls of the host it takes to create and to end a sandbox."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from django.db import connection
from django.db.models.sql.compiler import SQLCompiler
from django.http.request import HttpHeaders
from django.test import Client
from django.test.utils import CaptureQueriesContext
from psycopg import _queries

from hostruntime.wire.sandboxes import DailyUsage, ResourceUsage, UsageInfo
from orkestr_console.accounts import admission, limits
from orkestr_console.accounts.usage import today
from sandboxes_app.models import Sandbox
from sandboxes_app.services import create, metering, state
from tests.fakes.host import FakeHost

pytestmark = pytest.mark.usefixtures("used")
JSON = "application/json"
BODY = {"template": "debian-12", "network": "off"}


@pytest.fixture
def used(api: Client) -> None:
    """The token has been used just now, which is written down once a minute, and is known."""
    for _ in range(2):
        api.get("/v1/sandboxes")


@pytest.fixture
def box(api: Client, host: FakeHost) -> str:
    sandbox = str(api.post("/v1/sandboxes", BODY, "application/json").json()["id"])
    day = DailyUsage(1.5, 0.5, day=today())
    host.used[sandbox] = UsageInfo(sandbox, ended=False, before=ResourceUsage(), days=(day,))
    return sandbox


def statements(call: Callable[[], Any], status: int) -> list[str]:
    """The statements of a call."""
    with CaptureQueriesContext(connection) as captured:
        answer = call()
    assert answer.status_code == status, answer.content
    return [query["sql"] for query in captured.captured_queries]


def test_to_create_takes_five_in_one_transaction_and_two_alone(api: Client, host: FakeHost) -> None:
    """Admission; the team's lock, the count and the rows; that it runs."""
    found = statements(lambda: api.post("/v1/sandboxes", BODY, "application/json"), 201)
    # A savepoint is the transaction, inside of the test's own.
    assert sum("SAVEPOINT" in each for each in found) == 2, found
    assert len(found) == 7, found


def test_to_end_takes_three(api: Client, box: str) -> None:
    """Admission with the row; its end; its usage, with the release."""
    found = statements(lambda: api.delete(f"/v1/sandboxes/{box}"), 204)
    assert len(found) == 3, found


@pytest.mark.parametrize("path", ["", "/files/stat?path=/workspace"])
def test_to_read_takes_one(api: Client, box: str, path: str) -> None:
    found = statements(lambda: api.get(f"/v1/sandboxes/{box}{path}"), 200)
    assert len(found) == 1, found


def test_to_take_a_snapshot_takes_so_many(api: Client, box: str) -> None:
    """Admission with the row; the lock, what there is, the row and its entry in the audit log; a
    lock, the limits, what there is now, and that it is ready.  Two transactions."""
    found = statements(lambda: api.post(f"/v1/sandboxes/{box}/snapshots", {}, JSON), 201)
    assert sum("SAVEPOINT" in each for each in found) == 4, found
    assert len(found) == 13, found


def test_psycopg_remembers_the_statements(
    api: Client, host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It parses one anew each time that is too long, or has too many parameters."""
    forgotten: list[bytes] = []

    def parse(query: bytes, encoding: str) -> Any:
        forgotten.append(query)
        return _queries._query2pg(query, encoding)

    monkeypatch.setattr(_queries, "_query2pg_nocache", parse)
    made = api.post("/v1/sandboxes", BODY, "application/json").json()["id"]
    api.post(f"/v1/sandboxes/{made}/exec", {"command": "true"}, "application/json")
    assert api.delete(f"/v1/sandboxes/{made}").status_code == 204
    assert forgotten == []


def test_nothing_is_made_that_no_call_needs(
    api: Client, box: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No queries of Django's, and no dictionary of all headers."""
    made: list[str] = []
    for kind in (SQLCompiler, HttpHeaders):
        monkeypatch.setattr(kind, "__init__", noting(made, kind))
    assert api.post("/v1/sandboxes", BODY, "application/json").status_code == 201
    api.post(f"/v1/sandboxes/{box}/exec", {"command": "true"}, "application/json")
    assert api.delete(f"/v1/sandboxes/{box}").status_code == 204
    assert made == []


def noting(made: list[str], kind: type) -> Callable[..., None]:
    """A constructor that says so."""
    construct: Any = kind.__init__  # type: ignore[misc]

    def constructing(self: object, *args: Any, **kwargs: Any) -> None:
        made.append(type(self).__name__)
        construct(self, *args, **kwargs)

    return constructing


def test_the_statements_are_short() -> None:
    """It does so with those that are longer than this (psycopg._queries)."""
    written = (
        admission.admission_sql(Sandbox),
        limits.hold_sql(),
        create.count_sql(),
        state.addition_sql(),
        state.change_sql(("status", "driver", "started_at", "boot_ms"), audited=False, told=True),
        state.change_sql(("status", "driver", "ended_at"), audited=True, told=True),
        metering.count_last_sql(),
    )
    assert [len(each.encode()) for each in written if len(each.encode()) > 4096] == []
