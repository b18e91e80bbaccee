"""Connections to PostgreSQL: those of Django's pool, and plain ones for LISTEN and for locks.

A plain one is held for as long as its owner lives, which one from the pool must not be: with as
many slow calls as the pool has connections, nobody else would be served. So nothing slow is waited
for with a pooled connection in hand (:func:`before_waiting`), and a database that cannot be had
just now is told as that, and not as a defect (:func:`unavailable`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import psycopg
from django.db import DatabaseError, InterfaceError, connection, connections
from psycopg.abc import PQGen
from psycopg.errors import _WaitTimeout as WaitTimeout

from hostruntime.host.patience import scaled
from orkestr_console.core.errors import DatabaseUnavailable

logger = logging.getLogger(__name__)

# A peer that vanished without a word is noticed within half a minute (libpq's parameters).
KEEPALIVE: dict[str, Any] = {
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "connect_timeout": round(scaled(10)),
}

# How long what has happened elsewhere is tried to be noted: a restart takes a few seconds.
NOTING_SECONDS = 20.0
LONGEST_PAUSE = 1.0
# How often a wait looks whether it is to go on; psycopg's own.
LOOK_SECONDS = 0.1
# How long a request waits for what one statement answers. A server that is stopped (SIGSTOP) closes
# no connection, and no timeout of its own ends a statement then; its watchdog takes longer.
ANSWER_SECONDS = scaled(10.0)
# Classes of SQLSTATE that say that the server cannot work just now (PostgreSQL manual, appendix A):
# connection exceptions, too few resources, operator intervention (a shutdown), system errors.
AWAY = ("08", "53", "57P", "58")


class ConnectionHeldError(RuntimeError):
    """A defect of ours: something slow is waited for inside of a transaction."""


class RequestConnection(psycopg.Connection[Any]):
    """A connection of the pool that requests use: a server that says nothing is given up."""

    def wait(
        self, gen: PQGen[Any], interval: float = LOOK_SECONDS, timeout: float | None = None
    ) -> Any:
        """As psycopg's. Raises ``psycopg.OperationalError`` after ``ANSWER_SECONDS``."""
        try:
            return super().wait(gen, interval, timeout or ANSWER_SECONDS)
        except WaitTimeout as error:
            # Nothing is known of what it was asked: it is asked nothing more.
            self.pgconn.finish()
            raise psycopg.OperationalError("the database server does not answer") from error


def connection_arguments(purpose: str) -> dict[str, Any]:
    """What ``psycopg.connect`` needs to reach the default database, with autocommit.

    ``purpose`` is shown as the ``application_name`` in ``pg_stat_activity``.
    """
    database = connections.settings["default"]
    options = {
        name: value
        for name, value in database["OPTIONS"].items()
        if name not in {"pool", "server_side_binding", "isolation_level", "assume_role"}
    }
    named = {
        # As the test runner may have changed it.
        "dbname": connections["default"].settings_dict["NAME"],
        "user": database["USER"],
        "password": database["PASSWORD"],
        "host": database["HOST"],
        "port": database["PORT"],
    }
    given = {name: value for name, value in named.items() if value}
    return {
        **KEEPALIVE,
        **given,
        **options,
        "application_name": f"orkestr {purpose}",
        "autocommit": True,
    }


def let_go() -> None:
    """Give this thread's connection back to the pool before an answer that lasts.

    Django keeps it until the answer has been sent: as many streams as the pool has connections
    would leave none for anybody else. A transaction keeps it.
    """
    if not connection.in_atomic_block:
        connection.close()


def before_waiting() -> None:
    """Give this thread's connection back to the pool: what follows may take long.

    The next statement takes one again. Raises ``ConnectionHeldError`` inside of a transaction,
    which could not be taken up again, and would keep its locks and its connection from everybody.
    """
    # The transaction that Django wraps a test in is none of ours.
    if any(not getattr(block, "_from_testcase", False) for block in connection.atomic_blocks):
        raise ConnectionHeldError("a host is asked, or waited for, inside of a transaction")
    let_go()


def unavailable(error: BaseException | None) -> DatabaseUnavailable | None:
    """What to tell of an error that says that the database cannot be had just now, else None.

    That is: no connection of the pool came free in time, or the server went away or does not let
    anybody in (``AWAY``). An error in a statement of ours is a defect, and gets None.
    """
    if isinstance(error, DatabaseError | InterfaceError):
        error = error.__cause__ or error
    if isinstance(error, psycopg.InterfaceError | InterfaceError):
        return DatabaseUnavailable()
    if not isinstance(error, psycopg.Error):
        return None
    # Without an SQLSTATE it is libpq that says it, or the pool, in which nothing came free in time.
    lost = error.sqlstate is None and isinstance(error, psycopg.OperationalError)
    return DatabaseUnavailable() if lost or (error.sqlstate or "").startswith(AWAY) else None


def persistently[R](note: Callable[[], R]) -> R:
    """What ``note`` answers, tried again while the database is away: for what has happened already.

    A command has run and a container has started whether or not that can be written down at once.
    ``note`` must bear to be done twice, should the answer to its commit be what was lost. Raises
    what it raises after ``NOTING_SECONDS``, and at once inside of a transaction.
    """
    until, pause = time.monotonic() + scaled(NOTING_SECONDS), 0.1
    while True:
        try:
            return note()
        except (DatabaseError, InterfaceError) as error:
            inside = connection.in_atomic_block
            if inside or unavailable(error) is None or time.monotonic() > until:
                raise
            logger.warning("the database is away, what happened is noted later: %s", error)
            connection.close()
        time.sleep(pause)
        pause = min(pause * 2, LONGEST_PAUSE)
