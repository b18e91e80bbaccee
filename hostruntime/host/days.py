"""Splitting a period into UTC days."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta


def split_by_day(start: float, end: float) -> Iterator[tuple[date, float]]:
    """The days from ``start`` to ``end`` (Unix seconds), each with its share of the period.

    The shares add up to 1; an empty period belongs to the day of its end.
    """
    length = end - start
    if length <= 0:
        yield datetime.fromtimestamp(end, UTC).date(), 1.0
        return
    while start < end:
        day = datetime.fromtimestamp(start, UTC).date()
        midnight = datetime.combine(day + timedelta(days=1), datetime.min.time(), UTC).timestamp()
        yield day, (min(midnight, end) - start) / length
        start = midnight
