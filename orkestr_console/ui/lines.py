"""Lines over time, as shapes for a template: areas in a box 100 high and 1000 wide.

Like a chart by day (:mod:`orkestr_console.ui.charts`), the box is stretched to fit, so words and
numbers are HTML next to it.
"""

from __future__ import annotations

from collections.abc import Sequence

WIDTH, HEIGHT = 1000, 100

# The beginning and the end of a period, and the amount in it.
type Period = tuple[float, float, float]


def area(periods: Sequence[Period], start: float, end: float, top: float) -> str:
    """The path of an area over ``periods``, which are in order; time between them stays empty.

    The box is from ``start`` to ``end``, and from 0 to ``top`` (SVG 2, 9.3).
    """
    if end <= start or top <= 0:
        return ""
    steps = []
    for began, ended, amount in periods:
        left, right = (
            round(WIDTH * min(max((at - start) / (end - start), 0.0), 1.0), 1)
            for at in (began, ended)
        )
        if right > left:
            y = round(HEIGHT * (1 - min(max(amount / top, 0.0), 1.0)), 1)
            steps.append(f"M{left:g} {HEIGHT}V{y:g}H{right:g}V{HEIGHT}Z")
    return "".join(steps)
