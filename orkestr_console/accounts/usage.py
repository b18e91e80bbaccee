"""What teams used, by day (UTC): the only place that writes and reads ``UsageDay``.

Who meters calls :func:`add` in the transaction that also remembers what has been counted, so
nothing is counted twice or lost, whatever crashes.
"""

from __future__ import annotations

from calendar import monthrange
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any, NamedTuple

from django.db import connection
from django.db.models import QuerySet
from django.utils import timezone

from hostruntime.host.days import split_by_day
from orkestr_console.accounts.actor import READ, Actor
from orkestr_console.accounts.models import Metric, UsageDay

# The day's most, not its sum.
PEAK_METRICS = frozenset({Metric.IMAGE_BYTES, Metric.SHARED_BYTES})

_UPSERT = """
INSERT INTO accounts_usageday AS kept (team_id, day, metric, amount)
SELECT * FROM unnest(%(teams)s::varchar[], %(days)s::date[], %(metrics)s::varchar[],
    %(amounts)s::float8[])
WHERE {condition} ORDER BY 1, 2, 3
ON CONFLICT (team_id, day, metric) DO UPDATE SET amount = {amount}
"""
_SUM = "kept.amount + excluded.amount"
_ADD_SQL = _UPSERT.format(amount=_SUM, condition="TRUE")
_MAXIMUM_SQL = _UPSERT.format(amount="greatest(kept.amount, excluded.amount)", condition="TRUE")


class Key(NamedTuple):
    """Whose usage, when, of what."""

    team_id: str
    day: date
    metric: Metric


def add(amounts: Mapping[Key, float]) -> None:
    """Add to the days' totals. In key order, so that two writers cannot deadlock."""
    _write(_ADD_SQL, {key: amount for key, amount in amounts.items() if amount > 0})


def addition_sql(condition: str) -> str:
    """The same, under a condition, as a part of a statement that remembers what it has counted.

    Its parameters are :func:`parameters`.
    """
    return _UPSERT.format(amount=_SUM, condition=condition)


def parameters(amounts: Mapping[Key, float]) -> dict[str, Any]:
    """The parameters of the statements that add."""
    return {
        "teams": [key.team_id for key in amounts],
        "days": [key.day for key in amounts],
        "metrics": [str(key.metric) for key in amounts],
        "amounts": list(amounts.values()),
    }


def raise_maximum(amounts: Mapping[Key, float]) -> None:
    """Raise each day's amount to at least this."""
    _write(_MAXIMUM_SQL, amounts)


def _write(statement: str, amounts: Mapping[Key, float]) -> None:
    if not amounts:
        return
    with connection.cursor() as cursor:
        cursor.execute(statement, parameters(amounts))


def seconds_by_day(
    team_id: str, metric: Metric, begin: datetime, end: datetime
) -> dict[Key, float]:
    """The seconds from ``begin`` to ``end``, split by day."""
    seconds = max((end - begin).total_seconds(), 0.0)
    return {
        Key(team_id, day, metric): seconds * share
        for day, share in split_by_day(begin.timestamp(), end.timestamp())
    }


type Amounts = Mapping[Metric, float]


@dataclass(frozen=True)
class Day:
    """One day's amounts; 0 for metrics without usage."""

    day: date
    amounts: Amounts


@dataclass(frozen=True)
class Month:
    """A team's usage on every day of the month that starts with ``first``."""

    first: date
    days: tuple[Day, ...]

    def total(self, metric: Metric) -> float:
        """The month's total, or its peak for ``PEAK_METRICS``."""
        amounts = [day.amounts[metric] for day in self.days]
        return max(amounts) if metric in PEAK_METRICS else sum(amounts)

    @property
    def before(self) -> date:
        """The first day of the month before."""
        return (self.first - timedelta(days=1)).replace(day=1)

    @property
    def after(self) -> date:
        """The first day of the month after."""
        return (self.first + timedelta(days=31)).replace(day=1)


def today() -> date:
    """The current day in UTC, on which usage is counted."""
    return timezone.now().astimezone(UTC).date()


def month(actor: Actor, first: date) -> Month:
    """The team's usage in the month that starts with ``first``."""
    actor.require(READ)
    dates = [first + timedelta(days=n) for n in range(monthrange(first.year, first.month)[1])]
    amounts = {day: dict.fromkeys(Metric, 0.0) for day in dates}
    for row in _rows(actor).filter(day__range=(dates[0], dates[-1])):
        amounts[row.day][Metric(row.metric)] = row.amount
    return Month(first, tuple(Day(day, amounts[day]) for day in dates))


def months(actor: Actor) -> list[date]:
    """The months with any usage of the team, latest first."""
    actor.require(READ)
    found: Iterable[date] = _rows(actor).dates("day", "month", order="DESC")
    return list(found)


def _rows(actor: Actor) -> QuerySet[UsageDay]:
    return UsageDay.objects.filter(team=actor.team)
