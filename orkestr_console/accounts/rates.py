"""Rate limits of API tokens: a token bucket in the database, shared by all processes.

The bucket holds one minute's calls and refills evenly. One statement takes a call or reports an
empty bucket; the table is unlogged, so no call waits for a disk.
"""

from __future__ import annotations

import math

from django.db import connection
from psycopg import sql

from orkestr_console.accounts.models import ApiToken, RateBucket
from orkestr_console.core.errors import RateLimited

LEVEL_SQL = (
    "LEAST(%(most)s::float8, b.level"
    # A clock that was set back neither adds nor removes calls.
    " + GREATEST(EXTRACT(EPOCH FROM clock_timestamp() - b.at), 0) * %(most)s::float8 / 60)"
)
CONSUME_SQL = sql.SQL(
    "INSERT INTO {table} AS b (token_id, level, at)"
    " VALUES (%(token)s, %(most)s::float8 - 1, clock_timestamp())"
    " ON CONFLICT (token_id) DO UPDATE SET level = {level} - 1, at = clock_timestamp()"
    " WHERE {level} >= 1 RETURNING b.level"
)
LEVEL_QUERY = sql.SQL("SELECT {level} FROM {table} b WHERE token_id = %(token)s")
SQL_PARTS = {"table": sql.Identifier(RateBucket._meta.db_table), "level": sql.SQL(LEVEL_SQL)}


def consume(token: ApiToken, per_minute: int) -> None:
    """Count one call. Raises ``RateLimited`` with the seconds until there is room for another."""
    values: dict[str, str | int] = {"token": token.pk, "most": per_minute}
    with connection.cursor() as cursor:
        cursor.execute(CONSUME_SQL.format(**SQL_PARTS), values)
        if cursor.fetchone() is not None:
            return
        cursor.execute(LEVEL_QUERY.format(**SQL_PARTS), values)
        row = cursor.fetchone()
    level = float(row[0]) if row else 0.0
    wait = max(1, math.ceil((1 - level) * 60 / max(per_minute, 1)))
    raise RateLimited(
        f"This API token can make {per_minute:,} requests per minute; wait {wait} s, or ask an "
        "admin of your team for more.",
        retry_after=wait,
    )
