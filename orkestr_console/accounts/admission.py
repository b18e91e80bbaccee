"""Admitting an API call: one statement finds its token and counts the call.

Every call begins with it, so it is written by hand: each connection plans it once, which takes ten
times as long as running it, and Django builds no query.  The row that it returns has everything
that limits the token's team, so that what follows needs no second query.

The rate limit of a token is a token bucket, in the database so that all processes share it.  It
holds one minute's calls and refills evenly.  Its table is unlogged, so no call waits for a disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any

from django.db import connection, models

from orkestr_console.accounts.models import (
    Agreement,
    ApiToken,
    Plan,
    RateBucket,
    Team,
    TeamLimits,
    User,
)
from orkestr_console.core.errors import RateLimited

RATE_COLUMN = "api_requests_per_minute"
# The tables that the statement reads, by alias; most teams have no row in the outer joins.
MODELS: dict[str, type[models.Model]] = {
    "token": ApiToken,
    "team": Team,
    "plan": Plan,
    "limits": TeamLimits,
    "agreement": Agreement,
    "creator": User,
}
# A call counts only against a token that is presented whole: its lookup part is shown in lists, and
# knowing that must not be enough to use up the rate. The limit is the one of accounts.limits: the
# plan's number unless another was agreed on, and the team's own below it.
ADMISSION_SQL = """
WITH found AS (
    SELECT {columns},
        LEAST(COALESCE(agreement.{rate}, plan.{rate}), limits.{rate}) AS per_minute,
        token.digest = %(digest)s AND token.revoked_at IS NULL
            AND (token.expires_at IS NULL OR token.expires_at > clock_timestamp()) AS valid
    FROM {token} token
    JOIN {team} team ON team.id = token.team_id
    JOIN {plan} plan ON plan.code = team.plan_id
    LEFT JOIN {limits} limits ON limits.team_id = team.id
    LEFT JOIN {agreement} agreement ON agreement.team_id = team.id
    LEFT JOIN {creator} creator ON creator.id = token.created_by_id
    WHERE token.lookup = %(lookup)s
), counted AS (
    INSERT INTO {bucket} AS bucket (token_id, level, at)
    SELECT {token_id}, per_minute::float8 - 1, clock_timestamp() FROM found
    WHERE valid AND per_minute > 0
    ON CONFLICT (token_id) DO UPDATE SET level = {level} - 1, at = clock_timestamp()
    WHERE {level} >= 1
    RETURNING level
)
SELECT found.*, EXISTS (SELECT FROM counted) FROM found
"""
# Of a bucket that was there before; the row that could not be inserted knows its size.
INSERTED_SIZE = "(EXCLUDED.level + 1)"
LEVEL_SQL = (
    "LEAST({size}, bucket.level"
    # A clock that was set back neither adds nor removes calls.
    " + GREATEST(EXTRACT(EPOCH FROM clock_timestamp() - bucket.at), 0) * {size} / 60)"
)
LEVEL_QUERY = "SELECT {level} FROM {bucket} bucket WHERE token_id = %(token)s"


@dataclass(frozen=True)
class Admission:
    """A token, with its team and plan; ``counted`` tells whether it may make this call.

    ``valid`` is false if the digest is another, or the token was revoked or has expired.
    """

    token: ApiToken
    per_minute: int
    valid: bool
    counted: bool

    def require(self) -> None:
        """Raise ``RateLimited``, with the seconds until the next call, unless it was counted."""
        if self.counted:
            return
        wait = self._seconds_to_wait()
        raise RateLimited(
            f"This API token can make {self.per_minute:,} requests per minute; wait {wait} s, or "
            "ask an admin of your team for more.",
            retry_after=wait,
        )

    def _seconds_to_wait(self) -> int:
        size = float(self.per_minute)
        with connection.cursor() as cursor:
            cursor.execute(level_query(), {"token": self.token.pk, "size": size})
            row = cursor.fetchone()
        level = float(row[0]) if row else 0.0
        return max(1, math.ceil((1 - level) * 60 / max(size, 1)))


def admit(lookup: str, digest: str) -> Admission | None:
    """Find the token with this ``lookup``, and count a call if it is valid; None if none is found.

    ``digest`` is that of the whole token which the client presented (:mod:`accounts.tokens`).
    """
    with connection.cursor() as cursor:
        cursor.execute(admission_sql(), {"lookup": lookup, "digest": digest})
        row = cursor.fetchone()
    if row is None:
        return None
    values = iter(row)
    rows = {alias: read_row(model, values) for alias, model in MODELS.items()}
    per_minute, valid, counted = values
    return Admission(link(**rows), per_minute, valid, counted)


def read_row(model: type[models.Model], values: Iterator[Any]) -> Any:
    """An instance of ``model`` from the next values; None if an outer join found no row."""
    fields = concrete_fields(model)
    row = list(islice(values, len(fields)))
    names = [field.attname for field, _ in fields]
    if row[names.index(primary_key(model))] is None:
        return None
    converted = [
        value if convert is None else convert(value, None, connection)
        for value, (_, convert) in zip(row, fields, strict=True)
    ]
    return model.from_db(connection.alias, names, converted)


def link(*, token: Any, team: Any, plan: Any, limits: Any, agreement: Any, creator: Any) -> Any:
    """The token with its related rows in place, as ``select_related`` leaves them."""
    token.team, team.plan, token.created_by = team, plan, creator
    for name, row in (("limits", limits), ("agreement", agreement)):
        Team._meta.get_field(name).set_cached_value(team, row)  # type: ignore[union-attr]
        if row is not None:
            row.team = team
    return token


@cache
def concrete_fields(model: type[models.Model]) -> list[tuple[models.Field[Any, Any], Any]]:
    """A model's columns, each with the converter of its values if it has one."""
    return [(each, getattr(each, "from_db_value", None)) for each in model._meta.concrete_fields]


def primary_key(model: type[models.Model]) -> str:
    """The name of a model's primary key."""
    return str(model._meta.pk.attname) if model._meta.pk else ""


@cache
def admission_sql() -> str:
    """The statement with the models' tables and columns.

    A string, and a short one: psycopg caches what it parses up to a length (test_way_in).
    """
    columns = [
        f"{alias}.{quoted(field.column)}"
        for alias, model in MODELS.items()
        for field, _ in concrete_fields(model)
    ]
    # Numbered, as some names occur in two tables.
    names = {column: f"c{number}" for number, column in enumerate(columns)}
    return ADMISSION_SQL.format(
        **{alias: quoted(model._meta.db_table) for alias, model in MODELS.items()},
        columns=", ".join(f"{column} AS {name}" for column, name in names.items()),
        rate=quoted(RATE_COLUMN),
        bucket=quoted(RateBucket._meta.db_table),
        token_id=names[f"token.{quoted(primary_key(ApiToken))}"],
        level=LEVEL_SQL.format(size=INSERTED_SIZE),
    ).replace("\n    ", "\n")


@cache
def level_query() -> str:
    """The query for a bucket's current level."""
    level = LEVEL_SQL.format(size="%(size)s::float8")
    return LEVEL_QUERY.format(bucket=quoted(RateBucket._meta.db_table), level=level)


def quoted(name: str | None) -> str:
    """A table's or column's name, quoted for SQL."""
    return connection.ops.quote_name(str(name))
