"""The task queue on PostgreSQL: woken by NOTIFY, without prefetching, and losing nothing.

django-q2's own ORM broker polls, dispatches tasks before a worker is free, and runs each again
after a fixed time, whether or not the first run is still going. Here no clock decides that:

* ``lock`` in django-q2's row is when the task was dispatched; ``NEVER`` means that it was not yet.
  With the row's id it names the *run*, and the worker holds a lock of that name while it runs the
  task (:mod:`orkestr_console.queue.running`). It deletes the row when it is done.
* The pusher dispatches a task only while a worker is free.
* A run whose lock nobody holds belonged to a killed worker. After
  :data:`orkestr_console.queue.driving.ORPHAN_GRACE_SECONDS` the task is dispatched again, as
  another run; a worker that is late finds that its run is over, and runs nothing.

A task may still run twice, after a crash, and must be safe to. It must also keep its state on its
own row, because the queue forgets a task once it has run, whatever its result. All are short: long
work continues in a thread (:mod:`templates_app.services.driver`), driven on its own row.
"""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime

import psycopg
from django.conf import settings
from django.db import connection as django_connection
from django_q.brokers import Broker
from django_q.models import OrmQ, Schedule
from psycopg import sql

from hostruntime.host.patience import scaled
from orkestr_console.queue.driving import (
    HELD_LOCKS_SQL,
    LOCK_SEED,
    ORPHAN_GRACE_SECONDS,
    Connection,
    connect,
)

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
CLOCK_JUMP_SECONDS = scaled(5.0)
WAKE_CHANNEL = "orkestr_tasks"
NEVER = datetime(1970, 1, 1, tzinfo=UTC)

SQL_NAMES = {
    "table": sql.Identifier(OrmQ._meta.db_table),
    # A run's name: the task's id, and when it was dispatched.
    "run": sql.SQL("({0}.id || ' ' || extract(epoch FROM {0}.lock))").format(
        sql.Identifier(OrmQ._meta.db_table)
    ),
    "held": sql.SQL(HELD_LOCKS_SQL),
    "seed": sql.Literal(LOCK_SEED),
    "schedule": sql.Identifier(Schedule._meta.db_table),
}
IS_DISPATCHED_SQL = sql.SQL("SELECT {run} FROM {table} WHERE {run} = ANY(%s)").format(**SQL_NAMES)
ORPHANED_SQL = sql.SQL(
    "SELECT {run} FROM {table} WHERE key = %s AND lock <> %s"
    " AND hashtextextended({run}, {seed}) NOT IN ({held})"
).format(**SQL_NAMES)
DISPATCH_SQL = sql.SQL(
    # Materialized: for a small table, PostgreSQL would run the subquery once per row of the join,
    # each time locking up to the limit of further rows ("WITH Queries").
    "WITH chosen AS MATERIALIZED ("
    " SELECT id FROM {table} WHERE key = %(key)s AND (lock = %(never)s OR {run} = ANY(%(left)s)"
    # So that no worker starts it now.
    " AND pg_try_advisory_xact_lock(hashtextextended({run}, {seed})))"
    " ORDER BY id LIMIT %(room)s FOR UPDATE SKIP LOCKED)"
    " UPDATE {table} SET lock = clock_timestamp() FROM chosen WHERE {table}.id = chosen.id"
    " RETURNING {table}.id, {run}, payload"
).format(**SQL_NAMES)
FINISH_SQL = sql.SQL(
    "WITH done AS (DELETE FROM {table} WHERE {run} = %s) SELECT pg_notify(%s, '')"
).format(**SQL_NAMES)
# After the clock was set back, scheduled tasks would not run until it has caught up.
RESCHEDULE_SQL = sql.SQL(
    "UPDATE {schedule} SET next_run = now() WHERE schedule_type = %s"
    " AND next_run > now() + make_interval(mins => minutes)"
).format(**SQL_NAMES)


def is_current_run(run: str) -> bool:
    """Whether this is its task's current run. Raises ``DatabaseError``."""
    with django_connection.cursor() as cursor:
        cursor.execute(IS_DISPATCHED_SQL.as_string(), [[run]])
        return cursor.fetchone() is not None


def finish(run: str) -> None:
    """Remove a task from the queue, if this is its current run; wake the pusher.

    Raises ``DatabaseError``.
    """
    with django_connection.cursor() as cursor:
        cursor.execute(FINISH_SQL.as_string(), [run, WAKE_CHANNEL])


class PgBroker(Broker):  # type: ignore[misc]
    """The interface for django-q2: ``enqueue`` anywhere, the rest in the pusher.

    Workers remove tasks from the queue themselves (:mod:`orkestr_console.queue.running`).
    """

    def __init__(self, list_key: str | None = None) -> None:
        super().__init__(list_key)
        self._queue: Connection | None = None
        # The offset of the database's clock from the monotonic one.
        self._clock_offset: float | None = None
        # The runs of this pusher's workers.
        self._dispatched: set[str] = set()
        # The runs whose lock nobody holds, and since when, by the monotonic clock.
        self._orphaned_since: dict[str, float] = {}

    def enqueue(self, task: str) -> int:
        """Add a signed task on Django's connection: it can start when that commits."""
        row = OrmQ.objects.create(key=self.list_key, payload=task, lock=NEVER)
        with django_connection.cursor() as cursor:
            cursor.execute("SELECT pg_notify(%s, '')", [WAKE_CHANNEL])
        return int(row.pk)

    def dequeue(self) -> list[tuple[str, str]] | None:
        """Tasks for free workers, as ``(run, signed task)``; None after ``POLL_SECONDS``."""
        try:
            queue = self._connection()
            if tasks := self._dispatch(queue):
                return tasks
            next(queue.notifies(timeout=POLL_SECONDS, stop_after=1), None)
        except psycopg.Error as error:
            logger.warning("cannot reach the task queue, retrying: %s", error)
            self._disconnect()
            time.sleep(POLL_SECONDS)
        return None

    def _connection(self) -> Connection:
        """The pusher's connection, listening."""
        if self._queue is None:
            self._queue = connect("queue")
            self._queue.execute(sql.SQL("LISTEN {}").format(sql.Identifier(WAKE_CHANNEL)))
            self._clock_offset = None
            # The workers' locks may have been lost with the connection, and are being reacquired.
            self._orphaned_since.clear()
        return self._queue

    def _check_clock(self, queue: Connection) -> None:
        """Adjust the schedule if the database's clock was set, or the machine slept."""
        row = queue.execute("SELECT clock_timestamp()").fetchone()
        assert row is not None
        offset = row[0].timestamp() - time.monotonic()
        if self._clock_offset is not None and abs(offset - self._clock_offset) > CLOCK_JUMP_SECONDS:
            logger.warning("the clock was set by %+.0f s", offset - self._clock_offset)
            queue.execute(RESCHEDULE_SQL, [Schedule.MINUTES])
        self._clock_offset = offset

    def _disconnect(self) -> None:
        if self._queue is not None:
            self._queue.close()
            self._queue = None

    def _dispatch(self, queue: Connection) -> list[tuple[str, str]]:
        """Dispatch as many tasks as there are free workers."""
        self._check_clock(queue)
        orphaned = self._orphaned_runs(queue)
        running = queue.execute(IS_DISPATCHED_SQL, [list(self._dispatched)]).fetchall()
        self._dispatched = {run for (run,) in running}.difference(orphaned)
        free_workers = settings.Q_CLUSTER["workers"] - len(self._dispatched)
        if free_workers <= 0:
            return []
        parameters = {"key": self.list_key, "never": NEVER, "left": orphaned, "room": free_workers}
        rows = sorted(queue.execute(DISPATCH_SQL, parameters).fetchall())
        self._dispatched.update(run for _, run, _ in rows)
        return [(run, payload) for _, run, payload in rows]

    def _orphaned_runs(self, queue: Connection) -> list[str]:
        """The runs whose lock nobody was seen to hold for ``ORPHAN_GRACE_SECONDS``."""
        now = time.monotonic()
        rows = queue.execute(ORPHANED_SQL, [self.list_key, NEVER]).fetchall()
        self._orphaned_since = {run: self._orphaned_since.get(run, now) for (run,) in rows}
        return [
            run
            for run, since in self._orphaned_since.items()
            if now - since >= ORPHAN_GRACE_SECONDS
        ]

    def fail(self, task_id: str) -> None:
        """Remove an undecodable task from the queue."""
        finish(task_id)
