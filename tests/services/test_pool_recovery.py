"""A pool whose database was away for long: it is used again as soon as it is back."""

from __future__ import annotations

import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
import pytest
from django.conf import settings
from psycopg_pool import ConnectionPool

from orkestr_console.core.postgres import RequestConnection, connection_arguments, unavailable
from orkestr_console.runner.account import ensure_user
from orkestr_console.runner.postgres import Cluster
from tests.stack import wait_for

# Attempts at intervals that double would come after 1, 3, 7, 15 and 31 seconds.
AWAY_SECONDS = 20
MOST_TRIES = 3


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    ensure_user()
    with tempfile.TemporaryDirectory(prefix="orkestr-pool-", dir="/var/tmp") as scratch:
        Path(scratch).chmod(0o755)
        found = Cluster(Path(scratch) / "data", Path(scratch) / "sockets")
        found.create()
        yield found


@contextmanager
def serving(cluster: Cluster) -> Iterator[None]:
    server = subprocess.Popen(
        cluster.command(fsync="off"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for(cluster.is_ready, 60)
        yield
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)


def use(pool: ConnectionPool) -> None:
    with pool.connection() as connection:
        connection.execute("SELECT 1")


def keep_asking(pool: ConnectionPool, stop: threading.Event) -> None:
    """What callers do while it is away."""
    while not stop.wait(0.1):
        with suppress(psycopg.OperationalError):
            use(pool)


def test_a_pool_that_was_full_is_used_again_at_once(cluster: Cluster) -> None:
    options = {**settings.DATABASES["default"]["OPTIONS"]["pool"], "timeout": 1.5}
    options["check"] = ConnectionPool.check_connection
    with serving(cluster):
        cluster.ensure_database()
        pool = ConnectionPool(cluster.url, open=True, **options)
        held = [pool.getconn() for _ in range(options["max_size"])]
        for one in held:
            pool.putconn(one)
    stop = threading.Event()
    asking = [threading.Thread(target=keep_asking, args=(pool, stop)) for _ in range(4)]
    for thread in asking:
        thread.start()
    time.sleep(AWAY_SECONDS)
    stop.set()
    for thread in asking:
        thread.join()
    with serving(cluster), pool:
        tries = 0
        while True:
            tries += 1
            assert tries <= MOST_TRIES, "it is back, and not asked"
            with suppress(psycopg.OperationalError):
                use(pool)
                break


def test_a_changed_column_costs_a_connection_and_no_more(db: None) -> None:
    arguments = connection_arguments("test")
    with (
        RequestConnection.connect(**arguments) as prepared,
        psycopg.connect(**arguments) as migrating,
    ):
        migrating.execute("CREATE TABLE changing (name varchar(5))")
        try:
            prepared.execute("SELECT name FROM changing", prepare=True)
            migrating.execute("ALTER TABLE changing ALTER COLUMN name TYPE varchar(10)")
            with pytest.raises(psycopg.OperationalError, match="has changed") as raised:
                prepared.execute("SELECT name FROM changing", prepare=True)
        finally:
            migrating.execute("DROP TABLE changing")
        assert unavailable(raised.value) is not None
        # The pool replaces it.
        assert prepared.closed
