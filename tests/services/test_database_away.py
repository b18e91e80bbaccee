"""Which errors mean that the database is away, and what is tried again while it is."""

from __future__ import annotations

import os
import signal

import psycopg
import pytest
from django.db import IntegrityError, InterfaceError, OperationalError, connection, transaction
from psycopg_pool import PoolTimeout

from orkestr_console.accounts.models import Team
from orkestr_console.core import postgres
from orkestr_console.core.errors import DatabaseUnavailable
from orkestr_console.core.postgres import (
    RequestConnection,
    connection_arguments,
    persistently,
    release_before_waiting,
    unavailable,
)


def as_django_has_it(cause: psycopg.Error) -> Exception:
    """What Django makes of an error of psycopg's."""
    error = OperationalError(str(cause))
    error.__cause__ = cause
    return error


AWAY = [
    PoolTimeout("couldn't get a connection after 1.50 sec"),
    psycopg.OperationalError("the connection is lost"),
    psycopg.errors.AdminShutdown("terminating connection due to administrator command"),
    psycopg.errors.CannotConnectNow("the database system is starting up"),
    psycopg.errors.TooManyConnections("sorry, too many clients already"),
    psycopg.errors.DiskFull("could not extend file"),
]
DEFECTS = [
    psycopg.errors.DeadlockDetected("deadlock detected"),
    psycopg.errors.QueryCanceled("canceling statement"),
    psycopg.errors.UndefinedTable("relation does not exist"),
    psycopg.errors.UniqueViolation("duplicate key"),
]


@pytest.mark.parametrize("cause", AWAY, ids=lambda cause: type(cause).__name__)
def test_a_database_that_cannot_be_had_is_told_as_that(cause: psycopg.Error) -> None:
    for error in (cause, as_django_has_it(cause)):
        told = unavailable(error)
        assert isinstance(told, DatabaseUnavailable)
        assert (told.status, told.retry_after) == (503, 2)


def test_so_is_a_connection_that_is_closed_already() -> None:
    assert unavailable(InterfaceError("connection already closed")) is not None


@pytest.mark.parametrize("cause", DEFECTS, ids=lambda cause: type(cause).__name__)
def test_a_statement_that_is_wrong_is_a_defect(cause: psycopg.Error) -> None:
    assert unavailable(as_django_has_it(cause)) is None


@pytest.mark.parametrize("error", [ValueError("x"), IntegrityError("x"), None])
def test_anything_else_is_none_of_the_databases(error: Exception | None) -> None:
    assert unavailable(error) is None


@pytest.mark.django_db(transaction=True)
def test_what_has_happened_is_noted_once_the_database_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tries: list[int] = []

    def note() -> int:
        tries.append(1)
        if len(tries) < 3:
            # What a restart does to a connection that is in use.
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        return Team.objects.count()

    assert persistently(note) == 0
    assert len(tries) == 3


@pytest.mark.django_db(transaction=True)
def test_it_is_given_up_in_the_end_and_a_defect_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "PERSIST_SECONDS", 0.3)
    tries: list[int] = []

    def away() -> None:
        tries.append(1)
        raise as_django_has_it(psycopg.OperationalError("gone"))

    with pytest.raises(OperationalError):
        persistently(away)
    assert len(tries) > 1

    def wrong() -> None:
        tries.append(1)
        raise IntegrityError("x")

    tries.clear()
    with pytest.raises(IntegrityError):
        persistently(wrong)
    with transaction.atomic(), pytest.raises(OperationalError):
        persistently(away)
    assert len(tries) == 2


@pytest.mark.django_db(transaction=True)
def test_a_connection_is_given_back_before_something_is_waited_for() -> None:
    Team.objects.count()
    assert connection.connection is not None
    release_before_waiting()
    assert connection.connection is None
    assert Team.objects.count() == 0


@pytest.mark.django_db
def test_a_server_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is stopped closes nothing, and ends no statement."""
    monkeypatch.setattr(postgres, "STATEMENT_SECONDS", 0.3)
    with RequestConnection.connect(**connection_arguments("test")) as one:
        backend = one.info.backend_pid
        assert one.execute("SELECT 1").fetchone() == (1,)
        os.kill(backend, signal.SIGSTOP)
        try:
            with pytest.raises(psycopg.OperationalError, match="does not answer") as found:
                one.execute("SELECT 1")
        finally:
            os.kill(backend, signal.SIGCONT)
        assert unavailable(found.value) is not None
        assert one.closed


@pytest.mark.django_db
def test_a_statement_that_takes_its_time_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "STATEMENT_SECONDS", 60)
    with RequestConnection.connect(**connection_arguments("test")) as one:
        assert one.execute("SELECT pg_sleep(0.3), 1").fetchone() == ("", 1)
