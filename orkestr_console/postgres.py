"""A plain PostgreSQL connection beside Django's own, for LISTEN and for leases.

Such a connection is held for as long as its owner lives, which one from Django's pool must not be.
"""

from __future__ import annotations

from typing import Any

from django.db import connection, connections

from hostruntime.patience import scaled

# A peer that vanished without a word is noticed within half a minute (libpq's parameters).
KEEPALIVE: dict[str, Any] = {
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "connect_timeout": round(scaled(10)),
}


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
