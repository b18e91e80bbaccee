"""Counting what sandboxes use, exactly once.

The host tells sums that only grow, by day. What of them is counted already is on the sandbox's
row, and both change in one transaction under the row's lock: a collector that crashes, runs twice
or beside another adds nothing twice. Only once that is committed may the host forget.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import date

from django.db import transaction

from hostruntime.wire.sandboxes import ResourceUsage, UsageInfo
from orkestr_console.accounts import usage
from orkestr_console.accounts.models import Metric
from orkestr_console.accounts.usage import Key
from orkestr_console.core.hosts import host
from sandboxes_app.models import Sandbox


def collect(sandbox_id: str | None = None) -> None:
    """Count what all sandboxes used, or one; safe at any time. Raises the host's errors."""
    told = {info.id: info for info in host().usage(sandbox_id)}
    rows = Sandbox.objects.filter(pk__in=told)
    for team_id in sorted(set(rows.values_list("team_id", flat=True))):
        count(team_id, told)
    # One whose row is gone belongs to nobody: it is forgotten as well.
    ended = [info.id for info in told.values() if info.ended]
    if ended:
        host().acknowledge_usage(ended)


def count(team_id: str, told: Mapping[str, UsageInfo]) -> None:
    """Count what is new of one team's sandboxes."""
    amounts: dict[Key, float] = {}
    with transaction.atomic():
        rows = Sandbox.objects.filter(team_id=team_id, pk__in=told).order_by("pk")
        grown: list[Sandbox] = []
        for sandbox in rows.select_for_update().only("cpu_seconds", "gb_seconds"):
            counted = ResourceUsage(sandbox.cpu_seconds, sandbox.gb_seconds)
            for day, used in gained(told[sandbox.pk], counted):
                for metric, amount in by_metric(used):
                    key = Key(team_id, day, metric)
                    amounts[key] = amounts.get(key, 0.0) + amount
            total = told[sandbox.pk].total
            sandbox.cpu_seconds = max(sandbox.cpu_seconds, total.cpu_seconds)
            sandbox.gb_seconds = max(sandbox.gb_seconds, total.gb_seconds)
            grown.append(sandbox)
        Sandbox.objects.bulk_update(grown, ["cpu_seconds", "gb_seconds"])
        usage.add(amounts)


def gained(info: UsageInfo, counted: ResourceUsage) -> Iterator[tuple[date, ResourceUsage]]:
    """What each day has beyond ``counted``, of which the earliest days were counted first.

    What was used before the days that the host still tells apart goes to the first of them.
    """
    reached = ResourceUsage()
    for number, used in enumerate(info.days):
        until = reached + used + (ResourceUsage() if number else info.before)
        yield (
            used.day,
            ResourceUsage(
                beyond(reached.cpu_seconds, until.cpu_seconds, counted.cpu_seconds),
                beyond(reached.gb_seconds, until.gb_seconds, counted.gb_seconds),
            ),
        )
        reached = until


def beyond(begin: float, end: float, counted: float) -> float:
    """How much of the stretch from ``begin`` to ``end`` lies after ``counted``."""
    return max(end - max(begin, counted), 0.0)


def by_metric(used: ResourceUsage) -> tuple[tuple[Metric, float], ...]:
    """The amounts by the metric they are counted under."""
    return (
        (Metric.VCPU_SECONDS, used.cpu_seconds),
        (Metric.GB_SECONDS, used.gb_seconds),
    )
