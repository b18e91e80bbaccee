"""Charts by day, as shapes for a template: bars in a box 100 high and 10 wide per day.

The box is stretched to fit, so it contains only what can be stretched; words and numbers are HTML
next to it, at their own size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date

DAY_WIDTH = 10
BAR_WIDTH = 7
HEIGHT = 100
# Days of a month that are labelled below the chart.
LABELLED_DAYS = frozenset({1, 8, 15, 22, 29})
STEPS = (1, 1.5, 2, 3, 4, 5, 6, 8, 10)


@dataclass(frozen=True)
class Bar:
    """A segment of a day's bar; ``series`` is the number of its series, from 1."""

    series: int
    x: float
    y: float
    height: float


@dataclass(frozen=True)
class Column:
    """A day: its position, bars, tooltip text and label."""

    x: int
    bars: tuple[Bar, ...]
    text: str
    label: str


@dataclass(frozen=True)
class Chart:
    """A complete chart; ``scale`` has the labels at the top, the middle and the bottom."""

    columns: tuple[Column, ...]
    width: int
    scale: tuple[str, str, str]


def chart(
    days: Sequence[date],
    series: Sequence[tuple[str, Sequence[float]]],
    words: Callable[[float], str],
) -> Chart:
    """A chart of amounts by day; several series (name, amounts) are stacked."""
    peak = max((sum(amounts) for amounts in zip(*(a for _, a in series), strict=True)), default=0)
    top = round_up(peak)
    columns = tuple(
        _column(index, day, [(name, amounts[index]) for name, amounts in series], top, words)
        for index, day in enumerate(days)
    )
    return Chart(columns, DAY_WIDTH * len(days), (words(top), words(top / 2), words(0)))


def round_up(amount: float) -> float:
    """The next round number, as the top of the scale; 1 for 0."""
    if amount <= 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(amount))
    return next(step * unit for step in STEPS if step * unit >= amount * (1 - 1e-9))


def _column(
    index: int,
    day: date,
    parts: Sequence[tuple[str, float]],
    top: float,
    words: Callable[[float], str],
) -> Column:
    bars: list[Bar] = []
    x, y = index * DAY_WIDTH + (DAY_WIDTH - BAR_WIDTH) / 2, float(HEIGHT)
    for number, (_, amount) in enumerate(parts, start=1):
        height = round(amount / top * HEIGHT, 2)
        if height > 0:
            y = round(y - height, 2)
            bars.append(Bar(number, x, y, height))
    amounts_text = ", ".join(f"{name} {words(amount)}".strip() for name, amount in parts)
    label = str(day.day) if day.day in LABELLED_DAYS else ""
    return Column(index * DAY_WIDTH, tuple(bars), f"{day:%-d %B}: {amounts_text}", label)
