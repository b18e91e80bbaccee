"""Takes away what a test committed, as Django's flush does and in a fraction of its time.

TRUNCATE makes new files for every table and index, full or not, and after it Django makes its
content types and permissions again. Most tests leave a few rows in a few tables.
"""

from __future__ import annotations

from functools import cache

from django.db import connection, transaction
from django.test import TransactionTestCase
from psycopg import sql

# Filled by the migrations with what follows from the models alone.
RETAINED_TABLES = {"django_content_type", "auth_permission"}
# Its rows cannot be deleted (accounts.0004).
APPEND_ONLY = "accounts_auditentry"


@cache
def _tables() -> tuple[str, ...]:
    found = connection.introspection.django_table_names(only_existing=True, include_views=False)
    return tuple(sorted(set(found) - RETAINED_TABLES))


def empty_tables(_: TransactionTestCase | None = None) -> None:
    """Leave no row in any table of a model's, once whoever writes to one has ended."""
    names = [sql.Identifier(name) for name in _tables()]
    has_rows = sql.SQL(" UNION ALL ").join(
        sql.SQL("SELECT {} WHERE EXISTS (SELECT FROM {})").format(sql.Literal(name), table)
        for name, table in zip(_tables(), names, strict=True)
    )
    with transaction.atomic(), connection.cursor() as cursor:
        # As TRUNCATE would, wait for the transactions of others, and see what they committed.
        cursor.execute(sql.SQL("LOCK {}").format(sql.SQL(", ").join(names)))
        cursor.execute(has_rows)
        filled = [name for (name,) in cursor.fetchall()]
        if APPEND_ONLY in filled:
            cursor.execute(sql.SQL("TRUNCATE {}").format(sql.Identifier(APPEND_ONLY)))
        # Foreign keys are checked at the end.
        for name in filled:
            cursor.execute(sql.SQL("DELETE FROM {}").format(sql.Identifier(name)))
