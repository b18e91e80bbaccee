"""Rows that are read and written by statements of our own, as Django would read and write them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from django.db import connection, transaction
from django.test.utils import CaptureQueriesContext

from orkestr_console.accounts.models import AuditEntry, Outcome, Team
from orkestr_console.core.rows import fetch, insert, insert_sql, insert_values, select_sql

# psycopg parses a statement anew each time that is longer than this (psycopg._queries).
LONGEST_REMEMBERED = 4096
CONDITION = "id = %(id)s AND name = %(name)s"


def entry(team: Team) -> AuditEntry:
    return AuditEntry(
        team_id=team.pk,
        who="alice@example.org",
        action="sandbox.exec",
        surface="rest",
        outcome=Outcome.DONE,
        data={"exit_code": 0, "text": 'ü"\n'},
    )


@pytest.fixture
def flushing(team: Team) -> Iterator[None]:
    """A connection that flushes unless it is told not to; the tests' server never does."""
    with connection.cursor() as cursor:
        cursor.execute("SET synchronous_commit TO on")
        yield
        cursor.execute("RESET synchronous_commit")


def synchronous_commit() -> str:
    with connection.cursor() as cursor:
        cursor.execute("SHOW synchronous_commit")
        row = cursor.fetchone()
    return str(row[0]) if row else ""


def test_a_row_is_read_as_django_reads_it(team: Team, other_team: Team) -> None:
    found = fetch(Team, CONDITION, {"id": team.pk, "name": team.name})
    by_django = Team.objects.get(pk=team.pk)
    assert found == by_django
    assert all(
        getattr(found, field.attname) == getattr(by_django, field.attname)
        for field in Team._meta.concrete_fields
    )
    assert fetch(Team, CONDITION, {"id": team.pk, "name": other_team.name}) is None


@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("plans", "flushing")
@pytest.mark.parametrize("flush", [True, False])
def test_a_row_is_written_as_django_writes_it(team: Team, flush: bool) -> None:
    written = entry(team)
    with CaptureQueriesContext(connection) as captured:
        insert(written, flush=flush)
    assert len(captured) == 1
    found = AuditEntry.objects.get()
    for field in AuditEntry._meta.concrete_fields:
        if not field.primary_key:
            assert getattr(found, field.attname) == getattr(written, field.attname), field.name
    # What nobody waits for is that row alone.
    assert synchronous_commit() == "on"


@pytest.mark.usefixtures("flushing")
def test_inside_a_transaction_everything_is_flushed(team: Team) -> None:
    """Or what else it has done would be lost with the entry."""
    with transaction.atomic():
        insert(entry(team), flush=False)
        assert synchronous_commit() == "on"


def test_psycopg_remembers_the_statements() -> None:
    for statement in (
        select_sql(Team, CONDITION),
        insert_sql(AuditEntry, flush=True),
        insert_sql(AuditEntry, flush=False),
    ):
        assert len(statement.encode()) <= LONGEST_REMEMBERED


@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("plans")
def test_nobody_waits_for_the_disk_where_that_is_said(team: Team) -> None:
    with connection.cursor() as cursor:
        cursor.execute(insert_sql(AuditEntry, flush=False), [*insert_values(entry(team)).values()])
        # The setting at the statement's end, which is that of its commit.
        assert cursor.fetchone() == ("off",)
