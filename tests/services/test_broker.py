"""The task queue: who gets a task, when, and when again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from django.conf import settings
from django.db import connection, transaction
from django.utils import timezone
from django_q.models import OrmQ, Schedule
from django_q.signing import SignedPackage

from orkestr_console.queue import broker as module
from orkestr_console.queue import driving as drivers
from orkestr_console.queue.broker import NEVER, PgBroker, finish, is_current_run
from orkestr_console.queue.driving import connect, driving

pytestmark = pytest.mark.django_db(transaction=True)
SURE_SECONDS = 0.3


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.2)
    monkeypatch.setattr(module, "ORPHAN_GRACE_SECONDS", SURE_SECONDS)
    # No connection stays after a test: the database is dropped after the last.
    monkeypatch.setattr(drivers, "LINGER_SECONDS", 0.0)


@pytest.fixture
def broker() -> Iterator[PgBroker]:
    broker = PgBroker("test")
    yield broker
    broker._disconnect()


@pytest.fixture
def rival() -> Iterator[PgBroker]:
    rival = PgBroker("test")
    yield rival
    rival._disconnect()


@pytest.fixture
def queue() -> Iterator[psycopg.Connection[Any]]:
    with connect("test") as queue:
        yield queue


@pytest.fixture(params=["a new table", "a table in use"])
def planned(request: pytest.FixtureRequest) -> None:
    """What PostgreSQL knows of the table decides how it goes about a query."""
    if request.param == "a table in use":
        OrmQ.objects.create(key="another", payload="", lock=NEVER)
        with connection.cursor() as cursor:
            cursor.execute(f"VACUUM ANALYZE {OrmQ._meta.db_table}")


def put(broker: PgBroker) -> int:
    return broker.enqueue(SignedPackage.dumps({"func": "x"}))


def given(broker: PgBroker) -> list[str]:
    """The runs that are given out now, each by its task and its moment."""
    return [run for run, _ in broker.dequeue() or []]


def tasks(runs: list[str]) -> list[int]:
    return [int(run.split()[0]) for run in runs]


def given_in_time(broker: PgBroker) -> list[str]:
    """What is given out while the pusher looks again for long enough to be sure."""
    runs: list[str] = []
    end = time.monotonic() + 2 * SURE_SECONDS + 1
    while not runs and time.monotonic() < end:
        runs = given(broker)
    return runs


def test_a_task_that_was_rolled_back_is_never_seen(broker: PgBroker) -> None:
    with transaction.atomic():
        put(broker)
        transaction.set_rollback(True)
    assert given(broker) == []


def test_a_commit_wakes_the_pusher(broker: PgBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 10.0)
    broker._connection()
    task = put(broker)
    began = time.monotonic()
    found = given(broker) or given(broker)
    assert tasks(found) == [task]
    assert time.monotonic() - began < module.POLL_SECONDS


def test_a_task_is_given_out_once(broker: PgBroker, rival: PgBroker) -> None:
    put_in = [put(broker) for _ in range(settings.Q_CLUSTER["workers"])]
    first, second = given(broker), given(rival)
    assert tasks(first) == put_in
    assert second == []


def test_no_more_are_given_out_than_workers_are_free(planned: None, broker: PgBroker) -> None:
    workers = settings.Q_CLUSTER["workers"]
    for _ in range(workers + 2):
        put(broker)
    runs = given(broker)
    assert len(runs) == workers
    assert given(broker) == []
    finish(runs[0])
    assert len(given(broker)) == 1


def test_what_a_worker_runs_is_its_own_however_long_it_takes(broker: PgBroker) -> None:
    put(broker)
    (run,) = given(broker)
    with driving(run):
        assert is_current_run(run)
        assert given_in_time(broker) == []
        assert is_current_run(run)


def test_what_nobody_runs_is_given_out_again(
    planned: None, broker: PgBroker, rival: PgBroker
) -> None:
    """Once, whichever pusher comes first, though no worker is free but the one that was killed."""
    put_in = [put(broker) for _ in range(settings.Q_CLUSTER["workers"])]
    runs = given(broker)
    again = given_in_time(broker)
    assert tasks(again) == put_in
    assert not set(runs) & set(again)
    assert given(rival) == []
    # A worker that comes late with the first run finds that it is over.
    assert [is_current_run(run) for run in (runs[0], again[0])] == [False, True]
    rows = OrmQ.objects.filter(key="test")
    finish(runs[0])
    assert rows.count() == len(put_in)
    finish(again[0])
    assert rows.count() == len(put_in) - 1


def test_a_worker_that_begins_at_that_moment_keeps_it(
    broker: PgBroker, queue: psycopg.Connection[Any]
) -> None:
    put(broker)
    (run,) = given(broker)
    with driving(run):
        wanted = {"key": "test", "never": NEVER, "left": [run], "room": 1}
        assert queue.execute(module.DISPATCH_SQL, wanted).fetchall() == []
    assert queue.execute(module.DISPATCH_SQL, wanted).fetchall() != []


def test_a_pusher_that_just_came_back_lets_workers_lock_first(broker: PgBroker) -> None:
    """Their locks went with the database's restart, as its own connection did."""
    put(broker)
    given(broker)
    given(broker)
    time.sleep(SURE_SECONDS)
    broker._disconnect()
    assert given(broker) == []
    assert len(given_in_time(broker)) == 1


def test_the_pusher_survives_the_loss_of_its_connection(
    broker: PgBroker, queue: psycopg.Connection[Any]
) -> None:
    assert given(broker) == []
    queue.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name = 'orkestr queue' AND datname = current_database()"
    )
    task = put(broker)
    assert given(broker) == []
    assert tasks(given(broker)) == [task]


HOUR = 3600.0


@pytest.mark.parametrize("seconds", [HOUR, -HOUR])
def test_a_clock_that_is_set_ends_no_run(broker: PgBroker, seconds: float) -> None:
    put(broker)
    (run,) = given(broker)
    with driving(run):
        assert broker._clock_offset is not None
        broker._clock_offset -= seconds
        assert given_in_time(broker) == []
    assert len(given_in_time(broker)) == 1


def test_a_clock_set_back_keeps_nothing_from_running_on_schedule(broker: PgBroker) -> None:
    broker.dequeue()
    soon = timezone.now() + timedelta(seconds=HOUR)
    facts = {"name": "x", "func": "x", "next_run": soon}
    every = Schedule.objects.create(schedule_type=Schedule.MINUTES, minutes=1, **facts)
    once = Schedule.objects.create(schedule_type=Schedule.ONCE, **facts)
    broker.dequeue()
    every.refresh_from_db()
    assert every.next_run == soon
    assert broker._clock_offset is not None
    broker._clock_offset += HOUR
    broker.dequeue()
    every.refresh_from_db()
    once.refresh_from_db()
    assert every.next_run <= timezone.now()
    assert once.next_run == soon
