"""Admitting an API call: one statement finds its token, counts the call, and reads its subject.

Every call begins with it, so it is written by hand (:mod:`orkestr_console.core.rows`): each
connection plans it once, which takes ten times as long as running it.

What limits the token's team is read with it only if it has changed: this process keeps the rows of
tokens that it has seen, and the statement says of which version the current ones are.  So nothing
that is kept is ever out of date, and a token is refused at the first call after it was revoked.

The rate limit of a token is a token bucket, in the database so that all processes share it.  It
holds one minute's calls and refills evenly.  Its table is unlogged, so no call waits for a disk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

from django.db import connection, models

from orkestr_console.accounts.actor import Subject
from orkestr_console.accounts.limits import link_team
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
from orkestr_console.core.rows import columns_sql, quoted, read_row

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
    SELECT token.id, token.team_id, {versions} AS versions,
        LEAST(COALESCE(agreement.{rate}, plan.{rate}), limits.{rate}) AS per_minute,
        token.digest = %(digest)s AND token.revoked_at IS NULL
            AND (token.expires_at IS NULL OR token.expires_at > clock_timestamp()) AS valid
    FROM {rows}
), counted AS (
    INSERT INTO {bucket} AS bucket (token_id, level, at)
    SELECT id, per_minute::float8 - 1, clock_timestamp() FROM found
    WHERE valid AND per_minute > 0
    ON CONFLICT (token_id) DO UPDATE SET level = {level} - 1, at = clock_timestamp()
    WHERE {level} >= 1
    RETURNING level
)
SELECT found.versions, found.per_minute, found.valid, EXISTS (SELECT FROM counted){subject}
"""
# The rows of MODELS that belong to a token.
ROWS_SQL = """{token} token
    JOIN {team} team ON team.id = token.team_id
    JOIN {plan} plan ON plan.code = team.plan_id
    LEFT JOIN {limits} limits ON limits.team_id = team.id
    LEFT JOIN {agreement} agreement ON agreement.team_id = team.id
    LEFT JOIN {creator} creator ON creator.id = token.created_by_id
    WHERE token.lookup = %(lookup)s"""
SUBJECT_SQL = """, {columns} FROM found
LEFT JOIN {table} subject ON found.valid AND subject.id = %(subject)s
    AND subject.team_id = found.team_id"""
# Tokens whose rows are kept; past it, all are read anew.
MOST_KEPT = 1000
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


def admit(lookup: str, digest: str, subject: Subject | None = None) -> Admission | None:
    """Find the token with this ``lookup``, and count a call if it is valid; None if none is found.

    ``digest`` is that of the whole token which the client presented (:mod:`accounts.tokens`). The
    ``subject`` gets its row, if it is of the token's team.
    """
    statement = admission_sql(subject.model if subject else None)
    key = subject.id if subject else None
    with connection.cursor() as cursor:
        cursor.execute(statement, {"lookup": lookup, "digest": digest, "subject": key})
        row = cursor.fetchone()
    if row is None:
        return None
    versions, per_minute, valid, counted, *columns = row
    token = _kept.get(lookup, versions) or _kept.put(lookup, versions, read_token(lookup))
    if token is None:
        return None
    if subject is not None:
        subject.row = read_row(subject.model, iter(columns))
    return Admission(token, per_minute, valid, counted)


class KeptTokens:
    """The rows of tokens that this process has seen, by lookup and version; nobody changes them."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[str, ApiToken]] = {}

    def get(self, lookup: str, versions: str) -> ApiToken | None:
        """A token's rows, if they are of these versions."""
        kept = self._kept.get(lookup)
        return kept[1] if kept is not None and kept[0] == versions else None

    def put(self, lookup: str, versions: str, token: ApiToken | None) -> ApiToken | None:
        """Keep rows that are of these versions, or newer: then the next call reads them again."""
        if token is not None:
            if len(self._kept) >= MOST_KEPT:
                self._kept.clear()
            self._kept[lookup] = versions, token
        return token


_kept = KeptTokens()


def read_token(lookup: str) -> ApiToken | None:
    """A token with what limits its team, in one statement."""
    with connection.cursor() as cursor:
        cursor.execute(token_sql(), {"lookup": lookup})
        row = cursor.fetchone()
    if row is None:
        return None
    values = iter(row)
    return link(**{alias: read_row(model, values) for alias, model in MODELS.items()})


def link(*, token: Any, creator: Any, **of_team: Any) -> ApiToken:
    """The token with its related rows in place, as ``select_related`` leaves them."""
    token.team, token.created_by = link_team(**of_team), creator
    return cast("ApiToken", token)


@cache
def admission_sql(subject: type[models.Model] | None = None) -> str:
    """The statement with the models' tables, and a subject's columns.

    A string, and a short one: psycopg caches what it parses up to a length (test_way_in).
    """
    # Who changes a row writes it to another place, in another transaction ("System Columns" in the
    # PostgreSQL manual).
    versions = ", ".join(f"{alias}.xmin, {alias}.ctid" for alias in MODELS)
    with_subject = " FROM found"
    if subject is not None:
        table, columns = quoted(subject._meta.db_table), columns_sql((("subject", subject),))
        with_subject = SUBJECT_SQL.format(columns=columns, table=table)
    return ADMISSION_SQL.format(
        rows=rows_sql(),
        versions=f"ROW({versions})::text",
        subject=with_subject,
        rate=quoted(RATE_COLUMN),
        bucket=quoted(RateBucket._meta.db_table),
        level=LEVEL_SQL.format(size=INSERTED_SIZE),
    ).replace("\n    ", "\n")


@cache
def token_sql() -> str:
    """The query for a token's rows."""
    return f"SELECT {columns_sql(tuple(MODELS.items()))} FROM {rows_sql()}"  # noqa: S608


@cache
def rows_sql() -> str:
    """The rows of a token, as a part of a statement."""
    tables = {alias: quoted(model._meta.db_table) for alias, model in MODELS.items()}
    return ROWS_SQL.format(**tables)


@cache
def level_query() -> str:
    """The query for a bucket's current level."""
    level = LEVEL_SQL.format(size="%(size)s::float8")
    return LEVEL_QUERY.format(bucket=quoted(RateBucket._meta.db_table), level=level)
