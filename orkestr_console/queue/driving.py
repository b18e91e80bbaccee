"""Who drives what is on its way from one state to the next, and whether they still do.

A row on its way (``starting``, ``pausing``, ``capturing``, ``building`` …) names its *driver*: an
id that stands for one piece of work of one process, and not for a moment. For as long as the work
goes on its process holds an advisory lock of that name in PostgreSQL, so no clock says who lives:
the lock goes when the work is done, when the work fails, and when the process is killed
(pg_locks, and "Advisory Locks" in the PostgreSQL manual: those of a session end with it). A
process that is slow, or stopped, has its locks still. A worker holds one for the task that it runs
as well, under the name of that run (:mod:`orkestr_console.queue.broker`).

When PostgreSQL restarts every lock is gone, and is taken again within moments. So whoever finds
that nobody drives a row looks again after :data:`SURE_SECONDS` before they settle it.
"""

from __future__ import annotations

import logging
import select
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from django.db.models import BooleanField, F, Func, Value

from hostruntime.host.patience import scaled
from orkestr_console.core.ids import new_id
from orkestr_console.core.postgres import connection_arguments, unavailable

logger = logging.getLogger(__name__)

# How long nobody must be seen to drive a row.
SURE_SECONDS = scaled(2.0)
# How long the connection is kept for the next piece of work.
LINGER_SECONDS = 30.0
LOOK_SECONDS = 1.0
RETRY_SECONDS = 0.2
# Tells our locks from others': the bytes of "drive".
SEED = 0x6472697665

# The keys of all locks held; one of 64 bits is in two halves there (pg_locks).
HELD = (
    "SELECT (classid::bigint << 32) | objid::bigint FROM pg_locks"
    " WHERE locktype = 'advisory' AND objsubid = 1 AND granted AND database ="
    " (SELECT oid FROM pg_database WHERE datname = current_database())"
)
LOCK = "SELECT pg_advisory_lock(hashtextextended(d, %s)) FROM unnest(%s::text[]) AS d"
UNLOCK = "SELECT pg_advisory_unlock(hashtextextended(%s, %s))"

type Connection = psycopg.Connection[tuple[Any, ...]]


def connect(purpose: str) -> Connection:
    """A plain connection of one's own. Raises ``psycopg.OperationalError``."""
    return psycopg.connect(**connection_arguments(purpose))


class IsDriven(Func):
    """Whether the driver that a column names is at it now; a filter of a queryset."""

    output_field = BooleanField()
    template = f"hashtextextended(%(expressions)s) IN ({HELD})"

    def __init__(self, column: str) -> None:
        super().__init__(F(column), Value(SEED))


class Drivers:
    """What this process drives, and the connection that holds the locks while there is anything."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._driven: set[str] = set()
        self._session: Connection | None = None
        self._used = 0.0
        self._watched = False

    @contextmanager
    def driving(self, name: str = "") -> Iterator[str]:
        """Drive something for as long as this lasts, under a name that its row is to have.

        That is a new one unless it is given; who else holds it is waited for. Raises
        ``DatabaseUnavailable``.
        """
        driver = name or new_id("drv")
        with self._guard:
            self._begin(driver)
        try:
            yield driver
        finally:
            with self._guard:
                self._end(driver)

    def _begin(self, driver: str) -> None:
        try:
            try:
                self._lock([driver])
            except psycopg.Error:
                # The connection may be one of before PostgreSQL restarted.
                self._let_go()
                self._lock([*self._driven, driver])
        except psycopg.Error as error:
            self._let_go()
            raise unavailable(error) or error from error
        self._driven.add(driver)
        if not self._watched:
            threading.Thread(target=self._watch, name="drivers", daemon=True).start()
            self._watched = True

    def _end(self, driver: str) -> None:
        self._driven.discard(driver)
        self._used = time.monotonic()
        try:
            if self._session is not None:
                self._session.execute(UNLOCK, [driver, SEED])
        except psycopg.Error as error:
            logger.warning("a connection that held locks is gone: %s", error)
            self._let_go()
        if not self._driven and not LINGER_SECONDS:
            self._let_go()

    def _watch(self) -> None:
        """Take the locks again when the connection is lost; end when there is none to keep."""
        while True:
            session = self._session
            lost = hangs_up(session, LOOK_SECONDS if session else RETRY_SECONDS)
            with self._guard:
                if lost is self._session:
                    self._let_go()
                if self._session is None and self._driven:
                    self._take_again()
                idle = time.monotonic() - self._used > LINGER_SECONDS
                if not self._driven and (self._session is None or idle):
                    self._let_go()
                    self._watched = False
                    return

    def _take_again(self) -> None:
        try:
            self._lock(list(self._driven))
        except psycopg.Error as error:
            logger.warning("locks are not held, trying again: %s", error)
            self._let_go()

    def _lock(self, drivers: list[str]) -> None:
        if self._session is None:
            self._session = connect("drivers")
        self._session.execute(LOCK, [SEED, drivers])

    def _let_go(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None


def hangs_up(session: Connection | None, seconds: float) -> Connection | None:
    """The session if its other end goes away within so many seconds (POLLRDHUP, poll(2))."""
    try:
        poller = select.poll()
        if session is not None:
            poller.register(session.fileno(), select.POLLRDHUP)
        return session if poller.poll(seconds * 1000) else None
    except psycopg.Error:
        return session


driving = Drivers().driving
