"""The page of the audit log: who sees it, what its filters find, and what an export holds."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest
from django.test import Client

from orkestr_console.accounts import audit, audit_log
from orkestr_console.accounts.actor import Actor
from orkestr_console.accounts.models import AuditEntry, User
from sandboxes_app.models import Sandbox
from templates_app.models import Template
from tests.console.markup import tight

ADDRESS = "/team/audit/"


def text(answer: Any) -> str:
    return tight(answer)


def found(client: Client, **filters: str) -> list[str]:
    return [entry.action for entry in client.get(ADDRESS, filters).context["entries"]]


@pytest.fixture
def history(console: Client, building: Template, sandbox: Sandbox, read_only_api: Client) -> None:
    """A template and a sandbox made in the console, and a write refused to a token."""
    read_only_api.delete(f"/v1/templates/{building.pk}")


@pytest.mark.usefixtures("history")
def test_every_write_is_there_newest_first(console: Client, building: Template) -> None:
    assert found(console) == ["api.call", "sandbox.create", "template.create"]
    page = text(console.get(ADDRESS))
    assert "alice@example.org" in page
    assert "data-stack" in page
    assert "Denied" in page and "sandboxes:write" in page


@pytest.mark.usefixtures("history")
@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"outcome": "denied"}, ["api.call"]),
        ({"surface": "console"}, ["sandbox.create", "template.create"]),
        ({"action": "sandbox.create"}, ["sandbox.create"]),
        ({"who": "ALICE"}, ["sandbox.create", "template.create"]),
        ({"text": "data-stack"}, ["template.create"]),
        ({"since": "2100-01-01"}, []),
        ({"until": "2001-01-01"}, []),
        ({"since": "2001-01-01", "until": "2100-01-01", "outcome": "denied"}, ["api.call"]),
    ],
)
def test_filters_find(console: Client, filters: dict[str, str], expected: list[str]) -> None:
    assert found(console, **filters) == expected


@pytest.mark.parametrize(
    "filters",
    [
        {"since": "soon"},
        {"since": "0001-01-01"},
        {"until": "9999-12-31"},
        {"outcome": "maybe"},
        {"before": "x"},
        {"before": "9" * 19},
        {"before": "9" * 30},
        {"before": "0" * 4301},
    ],
)
def test_a_filter_that_cannot_be_read_is_said(console: Client, filters: dict[str, str]) -> None:
    answer = console.get(ADDRESS, filters)
    assert answer.status_code == 400
    assert 'role="alert"' in text(answer)


def test_pages_follow_each_other_without_a_gap(console: Client, console_actor: Actor) -> None:
    for number in range(audit_log.PAGE + 5):
        audit.record(console_actor, "test.write", object_id=number)
    first = console.get(ADDRESS)
    assert len(first.context["entries"]) == audit_log.PAGE
    second = console.get(f"{ADDRESS}?{first.context['older']}")
    seen = [e.object_id for page in (first, second) for e in page.context["entries"]]
    assert seen == [str(number) for number in reversed(range(audit_log.PAGE + 5))]
    assert not second.context["older"]


@pytest.mark.usefixtures("history")
def test_exports_hold_what_the_filters_find(console: Client) -> None:
    answer = console.get(f"{ADDRESS}csv/", {"outcome": "denied"})
    rows = list(csv.DictReader(io.StringIO(answer.content.decode())))
    assert [row["action"] for row in rows] == ["api.call"]
    assert rows[0]["code"] == "insufficient_scope"
    lines = console.get(f"{ADDRESS}jsonl/").content.decode().splitlines()
    assert [json.loads(line)["action"] for line in lines] == [
        "api.call",
        "sandbox.create",
        "template.create",
    ]


def test_no_cell_of_an_export_is_a_formula(console: Client, console_actor: Actor) -> None:
    audit.record(console_actor, "test.write", name="=HYPERLINK(1)", object_id="@x")
    rows = list(csv.reader(io.StringIO(console.get(f"{ADDRESS}csv/").content.decode())))
    assert "'=HYPERLINK(1)" in rows[1] and "'@x" in rows[1]


def test_another_teams_entries_are_nobodys_business(
    other_console: Client, console_actor: Actor
) -> None:
    audit.record(console_actor, "test.write")
    assert found(other_console) == []
    assert "test.write" not in other_console.get(f"{ADDRESS}csv/").content.decode()


@pytest.mark.parametrize("address", ["", "csv/", "jsonl/"])
def test_a_member_does_not_see_it(bob: User, address: str) -> None:
    client = Client()
    client.force_login(bob)
    assert client.get(f"{ADDRESS}{address}").status_code == 403


def test_nothing_typed_becomes_markup(console: Client, console_actor: Actor) -> None:
    audit.record(console_actor, "test.write", name="<script>1</script>", data={"x": "<b>"})
    page = text(console.get(ADDRESS))
    assert "<script>1" not in page
    assert "&lt;b&gt;" in page
    assert AuditEntry.objects.count() == 1
