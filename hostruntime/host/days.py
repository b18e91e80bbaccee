"""Splitting a period into UTC days."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache

_DAY_SECONDS = 86_400


def split_by_day(start: float, end: float) -> Iterator[tuple[date, float]]:
    """The days from ``start`` to ``end`` (Unix seconds), each with its share of the period.

    The shares add up to 1; an empty period belongs to the day of its end.
    """
    length = end - start
    # Nearly always: usage is split every few seconds, of each sandbox.
    if length <= 0 or int(start // _DAY_SECONDS) == int(end // _DAY_SECONDS):
        yield _day(int(end // _DAY_SECONDS)), 1.0
        return
    while start < end:
        day = datetime.fromtimestamp(start, UTC).date()
        midnight = datetime.combine(day + timedelta(days=1), datetime.min.time(), UTC).timestamp()
        yield day, (min(midnight, end) - start) / length
        start = midnight


@lru_cache(maxsize=4)
def _day(number: int) -> date:
    """The day so many days after 1970-01-01."""
    return date(1970, 1, 1) + timedelta(days=number)
