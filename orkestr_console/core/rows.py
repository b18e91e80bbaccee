"""Statements that every call makes, as SQL that is written once.

Django builds a query anew each time, which takes longer than running it. The SQL here is made once
for a model and never again, and psycopg prepares it on each connection. The rest of a model's
queries are Django's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import cache
from itertools import islice
from typing import Any

from django.db import connection, models

type Computed = tuple[tuple[str, str], ...]


def fetch[M: models.Model](
    model: type[M], condition: str, parameters: Mapping[str, Any]
) -> M | None:
    """The row that meets a condition, such as ``"id = %(id)s"``; None if there is none."""
    with connection.cursor() as cursor:
        cursor.execute(select_sql(model, condition), parameters)
        row = cursor.fetchone()
    return None if row is None else read_row(model, iter(row))


def insert(row: models.Model, *, flush: bool = True) -> None:
    """Insert a new row; the instance does not learn a key that the database chooses.

    Without ``flush`` it is committed, but nobody waits for the disk: it survives the end of any
    process of ours, and is lost only if the database server or the machine fails within a second
    ("Asynchronous Commit" in the PostgreSQL manual). Inside a transaction that makes no difference.
    """
    flush = flush or connection.in_atomic_block
    with connection.cursor() as cursor:
        cursor.execute(insert_sql(type(row), flush=flush), list(insert_values(row).values()))


def insert_values(
    row: models.Model, prefix: str = "", without: Collection[str] = ()
) -> dict[str, Any]:
    """A new row's values by column, for :func:`insert`'s statement and :func:`insertion_sql`.

    ``without`` are columns whose values the statement has from elsewhere.
    """
    return {
        f"{prefix}{field.column}": field.get_db_prep_save(field.pre_save(row, add=True), connection)
        for field in insertable_fields(type(row))
        if field.column not in without
    }


def read_row(model: type[models.Model], values: Iterator[Any]) -> Any:
    """An instance of ``model`` from the next values; None if an outer join found no row."""
    fields = concrete_fields(model)
    row = list(islice(values, len(fields)))
    names = attribute_names(model)
    if row[key_position(model)] is None:
        return None
    converted = [
        value if convert is None else convert(value, None, connection)
        for value, (_, convert) in zip(row, fields, strict=True)
    ]
    return model.from_db(connection.alias, names, converted)


@cache
def select_sql(model: type[models.Model], condition: str) -> str:
    """The statement of :func:`fetch`."""
    columns = ", ".join(quoted(field.column) for field, _ in concrete_fields(model))
    return f"SELECT {columns} FROM {quoted(model._meta.db_table)} WHERE {condition}"  # noqa: S608


@cache
def insert_sql(model: type[models.Model], *, flush: bool) -> str:
    """The statement of :func:`insert`; what it sets holds until the end of its transaction."""
    fields = insertable_fields(model)
    columns = ", ".join(quoted(field.column) for field in fields)
    places = ", ".join(["%s"] * len(fields))
    table = quoted(model._meta.db_table)
    returning = "" if flush else " RETURNING set_config('synchronous_commit', 'off', true)"
    return f"INSERT INTO {table} ({columns}) VALUES ({places}){returning}"  # noqa: S608


@cache
def insertion_sql(
    model: type[models.Model], prefix: str, source: str = "", computed: Computed = ()
) -> str:
    """An INSERT as a part of a larger statement, with the parameters of :func:`insert_values`.

    One row for each row of ``source``, if that is given; ``computed`` are columns, each with the
    SQL of its value.
    """
    elsewhere = dict(computed)
    names = [str(field.column) for field in insertable_fields(model)]
    columns = ", ".join(quoted(name) for name in names)
    values = ", ".join(elsewhere.get(name, f"%({prefix}{name})s") for name in names)
    rows = f" FROM {source}" if source else ""
    return f"INSERT INTO {quoted(model._meta.db_table)} ({columns}) SELECT {values}{rows}"


@cache
def columns_sql(aliases: tuple[tuple[str, type[models.Model]], ...]) -> str:
    """The columns of several models by their aliases, as :func:`read_row` reads them in turn."""
    return ", ".join(
        f"{alias}.{quoted(field.column)}"
        for alias, model in aliases
        for field, _ in concrete_fields(model)
    )


@cache
def insertable_fields(model: type[models.Model]) -> list[models.Field[Any, Any]]:
    """A model's columns but for a key that is the database's to choose."""
    fields = [field for field, _ in concrete_fields(model)]
    return [field for field in fields if not isinstance(field, models.AutoField)]


@cache
def concrete_fields(model: type[models.Model]) -> list[tuple[models.Field[Any, Any], Any]]:
    """A model's columns, each with the converter of its values if it has one."""
    return [(each, getattr(each, "from_db_value", None)) for each in model._meta.concrete_fields]


@cache
def attribute_names(model: type[models.Model]) -> list[str]:
    """The attributes of a model's columns."""
    return [field.attname for field, _ in concrete_fields(model)]


@cache
def key_position(model: type[models.Model]) -> int:
    """Where the primary key is among the columns."""
    return attribute_names(model).index(primary_key(model))


def primary_key(model: type[models.Model]) -> str:
    """The name of a model's primary key."""
    return str(model._meta.pk.attname) if model._meta.pk else ""


def quoted(name: str | None) -> str:
    """A table's or column's name, quoted for SQL."""
    return connection.ops.quote_name(str(name))
