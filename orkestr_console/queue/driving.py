"""Who drives a row from one state to the next, and whether that driver is alive.

A row in a transitional state (``starting``, ``pausing``, ``capturing``, ``building`` …) names its
*driver*: an id for one piece of work of one process. During the work, its process holds an advisory
lock of that name in PostgreSQL, so no clock decides who is alive: the lock is released when the
work succeeds, when it fails, and when the process is killed (pg_locks, and "Advisory Locks" in the
PostgreSQL manual: a session's locks end with it). A process that is slow, or stopped, still has its
locks. Short pieces of work of one kind share a driver, whose lock is held between them, so that
most take no statement (:meth:`Drivers.sharing`). A worker also holds a lock for the task that it
runs, under that run's name (:mod:`orkestr_console.queue.broker`).

When PostgreSQL restarts, all locks are lost, and reacquired within moments. So whoever finds a row
without a driver checks again after :data:`ORPHAN_GRACE_SECONDS` before settling it.
"""

from __future__ import annotations

import logging
import select
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from django.db.models import BigIntegerField, BooleanField, F, Func, Value

from hostruntime.host.patience import scaled
from orkestr_console.core.ids import new_id
from orkestr_console.core.postgres import connection_arguments, unavailable

logger = logging.getLogger(__name__)

# How long a row must be seen without a driver.
ORPHAN_GRACE_SECONDS = scaled(2.0)
# How long an idle connection is kept for the next piece of work.
LINGER_SECONDS = 30.0
CHECK_SECONDS = 1.0
RETRY_SECONDS = 0.2
# Separates our locks from others': the bytes of "drive".
LOCK_SEED = 0x6472697665

# The keys of all locks held; pg_locks splits a 64-bit key into two halves.
HELD_LOCKS_SQL = (
    "SELECT (classid::bigint << 32) | objid::bigint FROM pg_locks"
    " WHERE locktype = 'advisory' AND objsubid = 1 AND granted AND database ="
    " (SELECT oid FROM pg_database WHERE datname = current_database())"
)
LOCK_SQL = "SELECT pg_advisory_lock(hashtextextended(d, %s)) FROM unnest(%s::text[]) AS d"
UNLOCK_SQL = "SELECT pg_advisory_unlock(hashtextextended(%s, %s))"

type Connection = psycopg.Connection[tuple[Any, ...]]


def connect(purpose: str) -> Connection:
    """A plain connection outside of the pool. Raises ``psycopg.OperationalError``."""
    return psycopg.connect(**connection_arguments(purpose))


class IsDriven(Func):
    """Whether the driver that a column names is alive; a queryset filter."""

    output_field = BooleanField()
    template = f"hashtextextended(%(expressions)s) IN ({HELD_LOCKS_SQL})"

    def __init__(self, column: str) -> None:
        # As a 32-bit integer it would silently be cut where the server binds values.
        super().__init__(F(column), Value(LOCK_SEED, output_field=BigIntegerField()))


class Drivers:
    """This process's drivers, and the connection that holds their locks."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._driven: set[str] = set()
        # By kind of short work, the driver that the next piece of it shares.
        self._shared: dict[str, str] = {}
        # How many pieces of work each shared driver has now.
        self._pieces: Counter[str] = Counter()
        self._session: Connection | None = None
        self._last_used = 0.0
        self._watching = False

    @contextmanager
    def driving(self, name: str = "") -> Iterator[str]:
        """Hold a driver's lock inside this context; yields the name for the row.

        A new name unless one is passed; waits while another holds it. Raises
        ``DatabaseUnavailable``.
        """
        driver = name or new_id("drv")
        with self._guard:
            self._acquire(driver)
        try:
            yield driver
        finally:
            with self._guard:
                self._release(driver)

    @contextmanager
    def sharing(self, kind: str) -> Iterator[str]:
        """The same for short work, with a driver that other pieces of this ``kind`` share.

        A piece that fails may leave a row that names it. So nobody takes that driver any more, and
        it is gone once those who have it are done. Two kinds that may meet at one row are not the
        same. Raises ``DatabaseUnavailable``.
        """
        with self._guard:
            driver = self._join(kind)
        try:
            yield driver
        except BaseException:
            with self._guard:
                if self._shared.get(kind) == driver:
                    del self._shared[kind]
            raise
        finally:
            with self._guard:
                self._leave(driver)

    def _join(self, kind: str) -> str:
        driver = self._shared.get(kind)
        if driver is None:
            driver = new_id("drv")
            self._acquire(driver)
            self._shared[kind] = driver
        self._pieces[driver] += 1
        return driver

    def _leave(self, driver: str) -> None:
        self._pieces[driver] -= 1
        self._last_used = time.monotonic()
        if self._pieces[driver]:
            return
        del self._pieces[driver]
        if driver not in self._shared.values():
            self._release(driver)
        elif not LINGER_SECONDS:
            self._release_shared()

    def _release_shared(self) -> None:
        """Release the shared drivers that nobody has now."""
        for kind, driver in list(self._shared.items()):
            if driver not in self._pieces:
                del self._shared[kind]
                self._release(driver)

    def _acquire(self, driver: str) -> None:
        try:
            try:
                self._lock([driver])
            except psycopg.Error:
                # The connection may be from before PostgreSQL restarted.
                self._disconnect()
                self._lock([*self._driven, driver])
        except psycopg.Error as error:
            self._disconnect()
            raise unavailable(error) or error from error
        self._driven.add(driver)
        if not self._watching:
            threading.Thread(target=self._watch, name="drivers", daemon=True).start()
            self._watching = True

    def _release(self, driver: str) -> None:
        self._driven.discard(driver)
        self._last_used = time.monotonic()
        try:
            if self._session is not None:
                self._session.execute(UNLOCK_SQL, [driver, LOCK_SEED])
        except psycopg.Error as error:
            logger.warning("lost the connection that held the locks: %s", error)
            self._disconnect()
        if not self._driven and not LINGER_SECONDS:
            self._disconnect()

    def _watch(self) -> None:
        """Reacquire the locks when the connection is lost; return when it is idle."""
        while True:
            session = self._session
            hung_up = wait_for_hangup(session, CHECK_SECONDS if session else RETRY_SECONDS)
            with self._guard:
                if hung_up is self._session:
                    self._disconnect()
                if self._session is None and self._driven:
                    self._reacquire()
                idle = time.monotonic() - self._last_used > LINGER_SECONDS
                if idle:
                    self._release_shared()
                if not self._driven and (self._session is None or idle):
                    self._disconnect()
                    self._watching = False
                    return

    def _reacquire(self) -> None:
        try:
            self._lock(list(self._driven))
        except psycopg.Error as error:
            logger.warning("could not reacquire the locks, retrying: %s", error)
            self._disconnect()

    def _lock(self, drivers: list[str]) -> None:
        if self._session is None:
            self._session = connect("drivers")
        self._session.execute(LOCK_SQL, [LOCK_SEED, drivers])

    def _disconnect(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None


def wait_for_hangup(session: Connection | None, seconds: float) -> Connection | None:
    """The session, if its peer hangs up within ``seconds``; else None (POLLRDHUP, poll(2))."""
    try:
        poller = select.poll()
        if session is not None:
            poller.register(session.fileno(), select.POLLRDHUP)
        return session if poller.poll(seconds * 1000) else None
    except psycopg.Error:
        return session


_drivers = Drivers()
driving, sharing = _drivers.driving, _drivers.sharing
