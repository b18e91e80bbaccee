"""The task queue on PostgreSQL: woken by NOTIFY, leased with a heartbeat, never ahead of itself.

django-q2's own ORM broker polls, hands tasks out before a worker is free, and gives each a fixed
time after which it runs again whether or not the first run goes on. Here a task is *leased*:

* ``lock`` in django-q2's row is when the lease ends; ``NEVER`` means nobody has had it yet.
* The pusher leases a task only while a worker is free, and long ones (``settings.LONG_TASKS``)
  only while others than the reserved workers are.
* The worker that runs it renews the lease (:mod:`orkestr_console.queue.leases`) and deletes the row
when
  it is done. A worker that is killed renews nothing, so its task comes back within ``LEASE``.
* Every renewal names the lease it renews, so a worker that has lost its lease learns of it.
* After a pause of its own (PostgreSQL was away, the machine slept), or when the database's clock
  was set, the pusher lets running workers renew first, before it takes any lease to have ended.

A task may still run twice, after a crash: it must bear that. It must also keep its own state on
its own row, because the queue forgets a task once it has run, however it ended.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
from django.conf import settings
from django.db import connection as django_connection
from django.db.models import QuerySet
from django_q.brokers import Broker
from django_q.models import OrmQ, Schedule
from django_q.signing import SignedPackage
from psycopg import sql

from hostruntime.host.patience import scaled
from orkestr_console.core.postgres import connection_arguments

logger = logging.getLogger(__name__)

LEASE = timedelta(seconds=settings.TASK_LEASE_SECONDS)
HEARTBEAT_SECONDS = settings.TASK_LEASE_SECONDS / 4
# How long the pusher must have been watching before it believes that a lease has ended.
SETTLED_SECONDS = 2 * HEARTBEAT_SECONDS
POLL_SECONDS = 1.0
LONGEST_GAP_SECONDS = scaled(5.0)
WAKE = "orkestr_tasks"
NEVER = datetime(1970, 1, 1, tzinfo=UTC)
LONG = ":long"

TABLE = sql.Identifier(OrmQ._meta.db_table)
BUSY = sql.SQL("SELECT id, key FROM {} WHERE id = ANY(%s) AND lock > now()").format(TABLE)
CLAIM = sql.SQL(
    # Materialized: where it knows the table to be small, PostgreSQL joins by asking a subquery once
    # for each row, each time for as many rows more as the limit allows ("WITH Queries").
    "WITH chosen AS MATERIALIZED ("
    " SELECT id FROM {table} WHERE key = %(key)s"
    " AND (lock = %(never)s OR (%(settled)s AND lock < %(now)s)"
    # Nobody has a lease for so long: it is of before the clock was set back, and not renewed since.
    " OR (%(settled)s AND lock > %(now)s + 2 * %(lease)s))"
    " ORDER BY id LIMIT %(room)s FOR UPDATE SKIP LOCKED)"
    " UPDATE {table} SET lock = now() + %(lease)s FROM chosen WHERE {table}.id = chosen.id"
    " RETURNING {table}.id, payload, lock"
).format(table=TABLE)
RENEW = sql.SQL(
    "UPDATE {} SET lock = now() + %s WHERE id = %s AND lock = %s RETURNING lock"
).format(TABLE)
# After the clock was set back, what runs by the clock would not run until it is as late again.
SCHEDULE = sql.SQL(
    "UPDATE {} SET next_run = now() WHERE schedule_type = %s"
    " AND next_run > now() + make_interval(mins => minutes)"
).format(sql.Identifier(Schedule._meta.db_table))
FINISH = sql.SQL("DELETE FROM {} WHERE id = %s AND lock = %s").format(TABLE)

type Connection = psycopg.Connection[tuple[Any, ...]]


@dataclass(frozen=True)
class Lease:
    """One task for some seconds. ``until`` is the row's, and so proves whose lease it is."""

    task: int
    until: datetime

    def __str__(self) -> str:
        return f"{self.task} {self.until.isoformat()}"

    @classmethod
    def parse(cls, text: str) -> Lease:
        """What ``str()`` of a lease stands for."""
        task, until = text.split(" ", 1)
        return cls(int(task), datetime.fromisoformat(until))

    def renewed(self, queue: Connection) -> Lease | None:
        """The same task for longer; None if the lease was lost. Raises ``psycopg.Error``."""
        row = queue.execute(RENEW, [LEASE, self.task, self.until]).fetchone()
        return Lease(self.task, row[0]) if row else None

    def finish(self, queue: Connection) -> None:
        """Take the task off the queue and wake the pusher. Raises ``psycopg.Error``."""
        queue.execute(FINISH, [self.task, self.until])
        queue.execute("SELECT pg_notify(%s, '')", [WAKE])


def connect(purpose: str) -> Connection:
    """A connection of one's own to the queue. Raises ``psycopg.OperationalError``."""
    return psycopg.connect(**connection_arguments(purpose))


class PgBroker(Broker):  # type: ignore[misc]
    """What django-q2 calls: ``enqueue`` anywhere, the rest in the worker's processes."""

    def __init__(self, list_key: str | None = None) -> None:
        super().__init__(list_key)
        self._queue: Connection | None = None
        # By the monotonic clock.
        self._watching_since = 0.0
        self._last_look = 0.0
        # How far the database's clock is from it.
        self._ahead: float | None = None
        self._leased: set[int] = set()

    def enqueue(self, task: str) -> int:
        """Put a signed task on the queue, on Django's connection: it starts when that commits."""
        group = SignedPackage.loads(task).get("group")
        key = f"{self.list_key}{LONG}" if group in settings.LONG_TASKS else self.list_key
        row = OrmQ.objects.create(key=key, payload=task, lock=NEVER)
        with django_connection.cursor() as cursor:
            cursor.execute("SELECT pg_notify(%s, '')", [WAKE])
        return int(row.pk)

    def dequeue(self) -> list[tuple[str, str]] | None:
        """Tasks for free workers, as ``(lease, signed task)``; None after a while without any."""
        try:
            queue = self._watch()
            if claimed := self._claim(queue):
                return claimed
            next(queue.notifies(timeout=POLL_SECONDS, stop_after=1), None)
        except psycopg.Error as error:
            logger.warning("the task queue cannot be reached, trying again: %s", error)
            self._let_go()
            time.sleep(POLL_SECONDS)
        return None

    def _watch(self) -> Connection:
        """The pusher's connection, listening; notes since when it has watched without a gap."""
        now = time.monotonic()
        if self._queue is None:
            self._queue = connect("queue")
            self._queue.execute(sql.SQL("LISTEN {}").format(sql.Identifier(WAKE)))
            self._watching_since, self._ahead = now, None
        elif now - self._last_look > LONGEST_GAP_SECONDS:
            self._watching_since = now
        self._last_look = now
        return self._queue

    def _clock(self, queue: Connection) -> datetime:
        """The time by the database. That it was set, or that the machine slept, is noted.

        What a round compares with is this one reading: the clock may be set in the midst of it.
        """
        row = queue.execute("SELECT clock_timestamp()").fetchone()
        assert row is not None
        now: datetime = row[0]
        ahead = now.timestamp() - time.monotonic()
        if self._ahead is not None and abs(ahead - self._ahead) > LONGEST_GAP_SECONDS:
            logger.warning("the clock was set by %+.0f s", ahead - self._ahead)
            self._watching_since = time.monotonic()
            queue.execute(SCHEDULE, [Schedule.MINUTES])
        self._ahead = ahead
        return now

    def _let_go(self) -> None:
        if self._queue is not None:
            self._queue.close()
            self._queue = None

    def _claim(self, queue: Connection) -> list[tuple[str, str]]:
        """Lease as many tasks as there are free workers, short ones first."""
        now = self._clock(queue)
        busy = queue.execute(BUSY, [list(self._leased)]).fetchall()
        self._leased = {task for task, _ in busy}
        room = settings.Q_CLUSTER["workers"] - len(busy)
        claimed = self._lease(queue, self.list_key, room, now)
        long = sum(key.endswith(LONG) for _, key in busy)
        room_for_long = settings.Q_CLUSTER["workers"] - settings.RESERVED_WORKERS - long
        room = min(room - len(claimed), room_for_long)
        claimed += self._lease(queue, f"{self.list_key}{LONG}", room, now)
        return claimed

    def _lease(
        self, queue: Connection, key: str, room: int, now: datetime
    ) -> list[tuple[str, str]]:
        if room <= 0:
            return []
        settled = time.monotonic() - self._watching_since > SETTLED_SECONDS
        wanted = {"lease": LEASE, "key": key, "never": NEVER, "settled": settled, "room": room}
        rows = queue.execute(CLAIM, {**wanted, "now": now}).fetchall()
        self._leased.update(task for task, _, _ in rows)
        return [(str(Lease(task, until)), payload) for task, payload, until in sorted(rows)]

    def acknowledge(self, task_id: str) -> None:
        """Take a task off the queue, by its lease."""
        self.delete(task_id)

    def fail(self, task_id: str) -> None:
        """Take a task off the queue that nothing can be made of."""
        self.delete(task_id)

    def delete(self, task_id: str) -> None:
        """Take a task off the queue, by its lease."""
        lease = Lease.parse(task_id)
        OrmQ.objects.filter(pk=lease.task, lock=lease.until).delete()

    def _rows(self) -> QuerySet[Any]:
        rows: QuerySet[Any] = OrmQ.objects.filter(key__startswith=self.list_key)
        return rows

    def queue_size(self) -> int:
        """How many tasks wait for a worker."""
        return self._rows().filter(lock=NEVER).count()

    def lock_size(self) -> int:
        """How many tasks are leased."""
        return self._rows().exclude(lock=NEVER).count()

    def purge_queue(self) -> None:
        """Drop every task that waits."""
        self._rows().delete()

    def delete_queue(self) -> None:
        """Drop every task that waits."""
        self.purge_queue()

    def ping(self) -> bool:
        """The pusher waits for PostgreSQL by itself."""
        return True

    def info(self) -> str:
        """What this is, for django-q2's monitor."""
        return "PostgreSQL"

    def set_stat(self, key: str, value: str, timeout: int) -> None:
        """Not kept: the watchdog sees for itself whether the group is alive."""
