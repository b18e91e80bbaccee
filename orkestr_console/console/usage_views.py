"""What the team used, by day: charts, a table, and the same as CSV."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, datetime

from django.http import HttpResponse
from django.shortcuts import render
from django.views.decorators.http import require_safe

from orkestr_console.accounts import usage
from orkestr_console.accounts.models import Metric
from orkestr_console.accounts.usage import Month
from orkestr_console.core.errors import InvalidInput
from orkestr_console.http.decorators import ConsoleRequest, console_page
from orkestr_console.ui.charts import Chart, chart
from orkestr_console.ui.downloads import csv_file
from orkestr_console.ui.templatetags.console import duration, size

EARLIEST = date(2000, 1, 1)
LATEST = date(9998, 12, 1)


def number(value: float) -> str:
    """``0``, ``0.042``, ``3.14``, ``271.8``, ``12,345``: three digits tell enough."""
    if value == 0:
        return "0"
    digits = 0 if value >= 1000 else 1 if value >= 100 else 2 if value >= 1 else 3
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if digits else text


def byte_count(value: float) -> str:
    """Bytes as the console writes them."""
    return size(round(value))


@dataclass(frozen=True)
class Kind:
    """A chart's subject: its words, and the metrics in it with what each is called there."""

    title: str
    explained: str
    series: Sequence[tuple[str, Metric]]
    words: Callable[[float], str] = number
    is_time: bool = False


KINDS = (
    Kind(
        "vCPU-seconds",
        "CPU time used by sandboxes. 1 = one CPU fully busy for one second.",
        [("", Metric.VCPU_SECONDS)],
        is_time=True,
    ),
    Kind(
        "GB-seconds",
        "Memory that sandboxes held: one gigabyte for a second is one. Files in /tmp and "
        "/workspace are memory too.",
        [("", Metric.GB_SECONDS)],
    ),
    Kind(
        "Build seconds",
        "Time spent building templates, including failed and cancelled builds.",
        [("", Metric.BUILD_SECONDS)],
        is_time=True,
    ),
    Kind(
        "Template images",
        "Peak disk used by ready templates each day.",
        [("own", Metric.IMAGE_BYTES), ("shared with bases", Metric.SHARED_BYTES)],
        words=byte_count,
    ),
)


@dataclass(frozen=True)
class Figure:
    """One chart of the page with its words; ``summary`` is for who cannot see it."""

    kind: Kind
    chart: Chart
    total: str
    aside: str
    summary: str
    empty: bool


@require_safe
@console_page
def team_usage(request: ConsoleRequest) -> HttpResponse:
    """The page of one month, this one unless another is chosen."""
    month = usage.month(request.actor, chosen(request))
    current = usage.today().replace(day=1)
    known = {*usage.months(request.actor), month.first, current}
    context = {
        "month": month,
        "months": sorted(known, reverse=True),
        "is_latest": month.first >= current,
        "figures": [figure(kind, month) for kind in KINDS],
        "rows": table(month),
        "totals": cells({metric: month.total(metric) for metric in Metric}),
    }
    return render(request, "console/usage.html", context)


@require_safe
@console_page
def team_usage_csv(request: ConsoleRequest) -> HttpResponse:
    """A line for each day of the month; bytes are the day's most, everything else its sum."""
    month = usage.month(request.actor, chosen(request))
    name = f"usage-{request.actor.team.slug}-{month.first:%Y-%m}.csv"
    rows = (
        [day.day.isoformat(), *(exact(metric, day.amounts[metric]) for metric in Metric)]
        for day in month.days
    )
    return csv_file(name, ["day", *Metric.values], rows)


def chosen(request: ConsoleRequest) -> date:
    """The first day of the month in the address, else of this one. Raises ``InvalidInput``."""
    text = request.GET.get("month", "")
    if not text:
        return usage.today().replace(day=1)
    try:
        first = datetime.strptime(text, "%Y-%m").date()  # noqa: DTZ007 - a month has no zone
    except ValueError:
        first = date.min
    if not EARLIEST <= first <= LATEST:
        sentence = "must be a year and a month, such as 2026-11."
        raise InvalidInput(f"month: {sentence}", fields={"month": sentence})
    return first


def figure(kind: Kind, month: Month) -> Figure:
    """One chart of the page."""
    series = [(name, [day.amounts[metric] for day in month.days]) for name, metric in kind.series]
    total = sum(month.total(metric) for _, metric in kind.series)
    sums = [sum(amounts) for amounts in zip(*(amounts for _, amounts in series), strict=True)]
    if kind.words is byte_count:
        total = max(sums)
    peak = month.days[sums.index(max(sums))].day
    most = f"{kind.words(max(sums))} on {peak:%-d %B}" if total else "none"
    return Figure(
        kind=kind,
        chart=chart([day.day for day in month.days], series, kind.words),
        total=kind.words(total),
        aside=duration(total * 1000) if kind.is_time and total >= 60 else "",
        summary=f"{kind.title} by day in {month.first:%B %Y}. Most: {most}.",
        empty=not total,
    )


def table(month: Month) -> list[tuple[date, list[str]]]:
    """The days on which anything was used, with their amounts in words."""
    return [(day.day, cells(day.amounts)) for day in month.days if any(day.amounts.values())]


def cells(amounts: usage.Amounts) -> list[str]:
    """The amounts in words, in the order of the metrics."""
    return [
        (byte_count if metric in usage.PEAK_METRICS else number)(amounts[metric])
        for metric in Metric
    ]


def exact(metric: Metric, amount: float) -> str:
    """An amount for a spreadsheet."""
    return f"{amount:.0f}" if metric in usage.PEAK_METRICS else f"{amount:.3f}"
