"""How many statements, threads and calls of the host it takes to create and to end a sandbox."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext

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


def test_psycopg_remembers_the_statements() -> None:
    """It parses a statement anew each time that is longer than this (psycopg._queries)."""
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
