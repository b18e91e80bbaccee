"""A stretch of time by the days (UTC) it lies in."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta


def by_day(begin: float, end: float) -> Iterator[tuple[date, float]]:
    """The days from ``begin`` to ``end`` (Unix seconds), each with its share of the stretch.

    The shares add up to 1; a stretch without length is all on the day of its end.
    """
    length = end - begin
    if length <= 0:
        yield datetime.fromtimestamp(end, UTC).date(), 1.0
        return
    while begin < end:
        day = datetime.fromtimestamp(begin, UTC).date()
        midnight = datetime.combine(day + timedelta(days=1), datetime.min.time(), UTC).timestamp()
        yield day, (min(midnight, end) - begin) / length
        begin = midnight
