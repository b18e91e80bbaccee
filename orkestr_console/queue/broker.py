"""The task queue on PostgreSQL: woken by NOTIFY, never ahead of itself, and nothing in it is lost.

django-q2's own ORM broker polls, hands tasks out before a worker is free, and gives each a fixed
time after which it runs again whether or not the first run goes on. Here no clock says that:

* ``lock`` in django-q2's row is when the task was given out; ``NEVER`` means that it was not yet.
  With the row's id it names the *run*, and the worker holds a lock of that name while it runs the
  task (:mod:`orkestr_console.queue.running`). It deletes the row when it is done.
* The pusher gives a task out only while a worker is free.
* A run that nobody holds a lock for was its worker's, which was killed. After
  :data:`orkestr_console.queue.driving.SURE_SECONDS` the task is given out again, as another run;
  a worker that comes late finds that its own is over, and runs nothing.

A task may still run twice, after a crash: it must bear that. It must also keep its own state on
its own row, because the queue forgets a task once it has run, however it ended. All are short:
what takes long goes on in a thread (:mod:`templates_app.services.driver`), driven on its own row.
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
from orkestr_console.queue.driving import HELD, SEED, SURE_SECONDS, Connection, connect

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
LONGEST_GAP_SECONDS = scaled(5.0)
WAKE = "orkestr_tasks"
NEVER = datetime(1970, 1, 1, tzinfo=UTC)

NAMES = {
    "table": sql.Identifier(OrmQ._meta.db_table),
    # What a run is called: the task's id, and when it was given out.
    "run": sql.SQL("({0}.id || ' ' || extract(epoch FROM {0}.lock))").format(
        sql.Identifier(OrmQ._meta.db_table)
    ),
    "held": sql.SQL(HELD),
    "seed": sql.Literal(SEED),
    "schedule": sql.Identifier(Schedule._meta.db_table),
}
GIVEN = sql.SQL("SELECT {run} FROM {table} WHERE {run} = ANY(%s)").format(**NAMES)
LEFT = sql.SQL(
    "SELECT {run} FROM {table} WHERE key = %s AND lock <> %s"
    " AND hashtextextended({run}, {seed}) NOT IN ({held})"
).format(**NAMES)
GIVE = sql.SQL(
    # Materialized: where it knows the table to be small, PostgreSQL joins by asking a subquery once
    # for each row, each time for as many rows more as the limit allows ("WITH Queries").
    "WITH chosen AS MATERIALIZED ("
    " SELECT id FROM {table} WHERE key = %(key)s AND (lock = %(never)s OR {run} = ANY(%(left)s)"
    # So that no worker begins with it just now.
    " AND pg_try_advisory_xact_lock(hashtextextended({run}, {seed})))"
    " ORDER BY id LIMIT %(room)s FOR UPDATE SKIP LOCKED)"
    " UPDATE {table} SET lock = clock_timestamp() FROM chosen WHERE {table}.id = chosen.id"
    " RETURNING {table}.id, {run}, payload"
).format(**NAMES)
FINISH = sql.SQL(
    "WITH done AS (DELETE FROM {table} WHERE {run} = %s) SELECT pg_notify(%s, '')"
).format(**NAMES)
# After the clock was set back, what runs by the clock would not run until it is as late again.
SCHEDULE = sql.SQL(
    "UPDATE {schedule} SET next_run = now() WHERE schedule_type = %s"
    " AND next_run > now() + make_interval(mins => minutes)"
).format(**NAMES)


def is_given(run: str) -> bool:
    """Whether a task is still to be run as this run. Raises ``DatabaseError``."""
    with django_connection.cursor() as cursor:
        cursor.execute(GIVEN.as_string(), [[run]])
        return cursor.fetchone() is not None


def finish(run: str) -> None:
    """Take a task off the queue, unless this run is over; wake the pusher. Raises DatabaseError."""
    with django_connection.cursor() as cursor:
        cursor.execute(FINISH.as_string(), [run, WAKE])


class PgBroker(Broker):  # type: ignore[misc]
    """What django-q2 calls: ``enqueue`` anywhere, the rest in the pusher.

    Workers take tasks off the queue themselves (:mod:`orkestr_console.queue.running`).
    """

    def __init__(self, list_key: str | None = None) -> None:
        super().__init__(list_key)
        self._queue: Connection | None = None
        # How far the database's clock is from the monotonic one.
        self._ahead: float | None = None
        # The runs that this pusher's workers have.
        self._given: set[str] = set()
        # Those that nobody holds a lock for, and since when, by the monotonic clock.
        self._left: dict[str, float] = {}

    def enqueue(self, task: str) -> int:
        """Put a signed task on the queue, on Django's connection: it starts when that commits."""
        row = OrmQ.objects.create(key=self.list_key, payload=task, lock=NEVER)
        with django_connection.cursor() as cursor:
            cursor.execute("SELECT pg_notify(%s, '')", [WAKE])
        return int(row.pk)

    def dequeue(self) -> list[tuple[str, str]] | None:
        """Tasks for free workers, as ``(run, signed task)``; None after a while without any."""
        try:
            queue = self._watch()
            if given := self._give(queue):
                return given
            next(queue.notifies(timeout=POLL_SECONDS, stop_after=1), None)
        except psycopg.Error as error:
            logger.warning("the task queue cannot be reached, trying again: %s", error)
            self._let_go()
            time.sleep(POLL_SECONDS)
        return None

    def _watch(self) -> Connection:
        """The pusher's connection, listening."""
        if self._queue is None:
            self._queue = connect("queue")
            self._queue.execute(sql.SQL("LISTEN {}").format(sql.Identifier(WAKE)))
            self._ahead = None
            # The workers' locks may have gone with the connection, and are taken again.
            self._left.clear()
        return self._queue

    def _note_clock(self, queue: Connection) -> None:
        """See to what runs by the clock when the database's was set, or the machine slept."""
        row = queue.execute("SELECT clock_timestamp()").fetchone()
        assert row is not None
        ahead = row[0].timestamp() - time.monotonic()
        if self._ahead is not None and abs(ahead - self._ahead) > LONGEST_GAP_SECONDS:
            logger.warning("the clock was set by %+.0f s", ahead - self._ahead)
            queue.execute(SCHEDULE, [Schedule.MINUTES])
        self._ahead = ahead

    def _let_go(self) -> None:
        if self._queue is not None:
            self._queue.close()
            self._queue = None

    def _give(self, queue: Connection) -> list[tuple[str, str]]:
        """Give out as many tasks as there are free workers."""
        self._note_clock(queue)
        left = self._left_for_long(queue)
        busy = queue.execute(GIVEN, [list(self._given)]).fetchall()
        self._given = {run for (run,) in busy}.difference(left)
        room = settings.Q_CLUSTER["workers"] - len(self._given)
        if room <= 0:
            return []
        wanted = {"key": self.list_key, "never": NEVER, "left": left, "room": room}
        rows = sorted(queue.execute(GIVE, wanted).fetchall())
        self._given.update(run for _, run, _ in rows)
        return [(run, payload) for _, run, payload in rows]

    def _left_for_long(self, queue: Connection) -> list[str]:
        """The runs that nobody has held a lock for, at each look for some seconds."""
        now = time.monotonic()
        found = queue.execute(LEFT, [self.list_key, NEVER]).fetchall()
        self._left = {run: self._left.get(run, now) for (run,) in found}
        return [run for run, since in self._left.items() if now - since >= SURE_SECONDS]

    def fail(self, task_id: str) -> None:
        """Take a task off the queue that nothing can be made of."""
        finish(task_id)
