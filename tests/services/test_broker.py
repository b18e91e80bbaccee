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
from orkestr_console.queue.broker import NEVER, SETTLED_SECONDS, Lease, PgBroker, connect

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> Iterator[PgBroker]:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.2)
    broker = PgBroker("test")
    yield broker
    broker._let_go()


@pytest.fixture
def rival() -> Iterator[PgBroker]:
    rival = PgBroker("test")
    yield rival
    rival._let_go()


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


def put(broker: PgBroker, group: str | None = None) -> int:
    return broker.enqueue(SignedPackage.dumps({"func": "x", "group": group}))


def leased(broker: PgBroker) -> list[Lease]:
    return [Lease.parse(lease) for lease, _ in broker.dequeue() or []]


def settle(broker: PgBroker) -> None:
    """As if the pusher had been watching for long enough to believe that leases end."""
    broker._watch()
    broker._watching_since -= SETTLED_SECONDS + 1


def end_lease(task: int) -> None:
    OrmQ.objects.filter(pk=task).update(lock="2001-01-01T00:00:00Z")


def test_a_task_that_was_rolled_back_is_never_seen(broker: PgBroker) -> None:
    with transaction.atomic():
        put(broker)
        transaction.set_rollback(True)
    assert leased(broker) == []


def test_a_commit_wakes_the_pusher(broker: PgBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 10.0)
    broker._watch()
    task = put(broker)
    began = time.monotonic()
    found = leased(broker) or leased(broker)
    assert [lease.task for lease in found] == [task]
    assert time.monotonic() - began < module.POLL_SECONDS


def test_a_task_is_leased_once(broker: PgBroker, rival: PgBroker) -> None:
    tasks = {put(broker) for _ in range(5)}
    first, second = leased(broker), leased(rival)
    assert {lease.task for lease in first} == tasks
    assert second == []


def test_no_more_are_leased_than_workers_are_free(
    planned: None, broker: PgBroker, queue: psycopg.Connection[Any]
) -> None:
    workers = settings.Q_CLUSTER["workers"]
    for _ in range(workers + 2):
        put(broker)
    held = leased(broker)
    assert len(held) == workers
    assert leased(broker) == []
    held[0].finish(queue)
    assert len(leased(broker)) == 1


def test_some_workers_are_kept_from_long_tasks(planned: None, broker: PgBroker) -> None:
    workers, reserved = settings.Q_CLUSTER["workers"], settings.RESERVED_WORKERS
    for _ in range(workers):
        put(broker, "builds")
    assert len(leased(broker)) == workers - reserved
    assert leased(broker) == []
    short = [put(broker) for _ in range(reserved)]
    assert [lease.task for lease in leased(broker)] == short


def test_a_lease_that_ended_is_given_out_again(broker: PgBroker) -> None:
    task = put(broker)
    leased(broker)
    end_lease(task)
    settle(broker)
    assert [lease.task for lease in leased(broker)] == [task]


def test_a_pusher_that_just_came_back_lets_workers_renew_first(broker: PgBroker) -> None:
    task = put(broker)
    leased(broker)
    end_lease(task)
    assert leased(broker) == []
    settle(broker)
    broker._last_look -= module.LONGEST_GAP_SECONDS + 1
    assert leased(broker) == []


def test_a_lease_is_renewed_by_its_holder_alone(
    broker: PgBroker, queue: psycopg.Connection[Any]
) -> None:
    put(broker)
    (first,) = leased(broker)
    second = first.renewed(queue)
    assert second is not None
    assert second.until > first.until
    assert first.renewed(queue) is None
    first.finish(queue)
    assert OrmQ.objects.count() == 1
    second.finish(queue)
    assert OrmQ.objects.count() == 0


def test_a_lease_survives_being_written_down() -> None:
    lease = Lease(7, NEVER)
    assert Lease.parse(str(lease)) == lease


def test_the_pusher_survives_the_loss_of_its_connection(
    broker: PgBroker, queue: psycopg.Connection[Any]
) -> None:
    assert leased(broker) == []
    queue.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name = 'orkestr queue' AND datname = current_database()"
    )
    task = put(broker)
    assert leased(broker) == []
    assert [lease.task for lease in leased(broker)] == [task]


HOUR = 3600.0


def shift_lease(task: int, seconds: float) -> None:
    """What a clock that is set makes of a lease: its end is so much further away."""
    row = OrmQ.objects.get(pk=task)
    OrmQ.objects.filter(pk=task).update(lock=row.lock + timedelta(seconds=seconds))


def test_a_clock_set_forward_ends_no_lease(
    broker: PgBroker, queue: psycopg.Connection[Any]
) -> None:
    task = put(broker)
    (lease,) = leased(broker)
    settle(broker)
    # The database's clock goes an hour before the monotonic one, more than at the last look.
    assert broker._ahead is not None
    broker._ahead -= HOUR
    shift_lease(task, -HOUR)
    assert leased(broker) == [], "its worker has had no time to renew it"
    assert Lease(task, lease.until - timedelta(seconds=HOUR)).renewed(queue) is not None
    settle(broker)
    assert leased(broker) == []


def test_a_clock_set_back_keeps_no_lease_of_a_dead_worker(broker: PgBroker) -> None:
    task = put(broker)
    leased(broker)
    settle(broker)
    assert broker._ahead is not None
    broker._ahead += HOUR
    shift_lease(task, HOUR)
    assert leased(broker) == [], "its worker may live"
    settle(broker)
    assert [lease.task for lease in leased(broker)] == [task]


def test_a_clock_set_back_keeps_nothing_from_running_on_schedule(broker: PgBroker) -> None:
    broker.dequeue()
    soon = timezone.now() + timedelta(seconds=HOUR)
    facts = {"name": "x", "func": "x", "next_run": soon}
    every = Schedule.objects.create(schedule_type=Schedule.MINUTES, minutes=1, **facts)
    once = Schedule.objects.create(schedule_type=Schedule.ONCE, **facts)
    broker.dequeue()
    every.refresh_from_db()
    assert every.next_run == soon
    assert broker._ahead is not None
    broker._ahead += HOUR
    broker.dequeue()
    every.refresh_from_db()
    once.refresh_from_db()
    assert every.next_run <= timezone.now()
    assert once.next_run == soon
