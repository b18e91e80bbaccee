"""Connections to PostgreSQL: those of Django's pool, and plain ones for LISTEN and for locks.

A plain one is held as long as its owner lives, which one from the pool must not be: as many slow
calls as the pool has connections would block everybody else. So nothing slow is awaited while
holding a pooled connection (:func:`release_before_waiting`), and an unreachable database is
reported as that, not as a bug (:func:`unavailable`).
"""

from __future__ import annotations

import logging
import select
import time
from collections.abc import Callable
from typing import Any

import psycopg
from django.db import DatabaseError, InterfaceError, connection, connections
from psycopg.abc import PQGen
from psycopg.errors import _WaitTimeout as WaitTimeout
from psycopg_pool import ConnectionPool

from hostruntime.host.patience import scaled
from orkestr_console.core.errors import DatabaseUnavailable

logger = logging.getLogger(__name__)

# A peer that vanished silently is noticed within half a minute (libpq's parameters).
KEEPALIVE: dict[str, Any] = {
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "connect_timeout": round(scaled(10)),
}

# How long recording what has already happened is retried: a restart takes a few seconds.
PERSIST_SECONDS = 20.0
MAX_BACKOFF = 1.0
# How often a wait checks whether to continue; psycopg's own default.
CHECK_SECONDS = 0.1
# How long a request waits for one statement. A stopped server (SIGSTOP) closes no connection, and
# its own statement timeout doesn't fire then; its watchdog takes longer.
STATEMENT_SECONDS = scaled(10.0)
# Classes of SQLSTATE that mean the server cannot work now (PostgreSQL manual, appendix A):
# connection exceptions, too few resources, operator intervention (a shutdown), system errors.
UNAVAILABLE_SQLSTATES = ("08", "53", "57P", "58")
# Who reports that a prepared statement's columns have other types since (plancache.c). It has no
# SQLSTATE of its own, and its text may be translated.
STALE_STATEMENT = "RevalidateCachedQuery"


class ConnectionHeldError(RuntimeError):
    """A bug of ours: something slow is awaited inside a transaction."""


class RequestConnection(psycopg.Connection[Any]):
    """A pooled connection for requests: it gives up on a server that doesn't answer."""

    def wait(
        self, gen: PQGen[Any], interval: float = CHECK_SECONDS, timeout: float | None = None
    ) -> Any:
        """As psycopg's, but raise ``psycopg.OperationalError`` after ``STATEMENT_SECONDS``.

        Also if a prepared statement no longer fits: the next connection prepares it anew.
        """
        try:
            return super().wait(gen, interval, timeout or STATEMENT_SECONDS)
        except WaitTimeout as error:
            # The fate of the statement is unknown, so the connection is not used again.
            self.pgconn.finish()
            raise psycopg.OperationalError("the database server does not answer") from error
        except psycopg.errors.FeatureNotSupported as error:
            if error.diag.source_function != STALE_STATEMENT:
                raise
            self.pgconn.finish()
            raise psycopg.OperationalError("the database's schema has changed") from error


def check_connection(connection: psycopg.Connection[Any]) -> None:
    """Raise ``psycopg.OperationalError`` if a pooled connection was closed by the server.

    There is nothing to read from an idle connection until the server closes it or changes a
    parameter ("Message Flow" in the PostgreSQL manual), so a silent one needs no test statement.
    """
    poller = select.poll()
    poller.register(connection.fileno(), select.POLLIN)
    if poller.poll(0):
        ConnectionPool.check_connection(connection)


def connection_arguments(purpose: str) -> dict[str, Any]:
    """The arguments of ``psycopg.connect`` for the default database, with autocommit.

    ``purpose`` becomes part of the ``application_name`` in ``pg_stat_activity``.
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
    known = {name: value for name, value in named.items() if value}
    return {
        **KEEPALIVE,
        **known,
        **options,
        "application_name": f"orkestr {purpose}",
        "autocommit": True,
    }


def release_connection() -> None:
    """Return this thread's connection to the pool before a long response.

    Django keeps it until the response has been sent: as many streams as the pool has connections
    would leave none for anybody else. Inside a transaction, nothing is returned.
    """
    if not connection.in_atomic_block:
        connection.close()


def release_before_waiting() -> None:
    """Return this thread's connection to the pool before something slow.

    The next statement takes one again. Raises ``ConnectionHeldError`` inside a transaction, which
    could not be resumed, and would keep its locks and connection meanwhile.
    """
    # The transaction that Django wraps around a test doesn't count.
    if any(not getattr(block, "_from_testcase", False) for block in connection.atomic_blocks):
        raise ConnectionHeldError("a host is asked, or waited for, inside of a transaction")
    release_connection()


def unavailable(error: BaseException | None) -> DatabaseUnavailable | None:
    """The domain error if ``error`` means that the database is unavailable, else None.

    That is: no pooled connection became free in time, or the server went away or refuses
    connections (``UNAVAILABLE_SQLSTATES``). An error in one of our statements is a bug: None.
    """
    if isinstance(error, DatabaseError | InterfaceError):
        error = error.__cause__ or error
    if isinstance(error, psycopg.InterfaceError | InterfaceError):
        return DatabaseUnavailable()
    if not isinstance(error, psycopg.Error):
        return None
    # Without an SQLSTATE it comes from libpq, or from the pool after its timeout.
    lost = error.sqlstate is None and isinstance(error, psycopg.OperationalError)
    return (
        DatabaseUnavailable()
        if lost or (error.sqlstate or "").startswith(UNAVAILABLE_SQLSTATES)
        else None
    )


def persistently[R](operation: Callable[[], R]) -> R:
    """Run ``operation``, retrying while the database is away, to record what has already happened.

    A command has run and a container has started whether or not that can be recorded immediately.
    ``operation`` must be safe to repeat, as the answer to its commit may be lost. Its exception is
    raised after ``PERSIST_SECONDS``, and immediately inside a transaction.
    """
    until, delay = time.monotonic() + scaled(PERSIST_SECONDS), 0.1
    while True:
        try:
            return operation()
        except (DatabaseError, InterfaceError) as error:
            in_transaction = connection.in_atomic_block
            if in_transaction or unavailable(error) is None or time.monotonic() > until:
                raise
            logger.warning("the database is away, retrying: %s", error)
            connection.close()
        time.sleep(delay)
        delay = min(delay * 2, MAX_BACKOFF)
