"""Counting sandboxes' usage, exactly once.

The host reports totals that only grow, by day. The part already counted is on the sandbox's row,
and both change in one transaction under the row's lock: a collector that crashes, or runs twice, or
next to another, adds nothing twice. Only after the commit may the host forget.
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
    """Count the usage of all sandboxes, or of one; safe at any time. Raises the host's errors."""
    usage_by_id = {info.id: info for info in host().usage(sandbox_id)}
    rows = Sandbox.objects.filter(pk__in=usage_by_id)
    for team_id in sorted(set(rows.values_list("team_id", flat=True))):
        count(team_id, usage_by_id)
    # One without a row belongs to nobody, and is forgotten as well.
    ended = [info.id for info in usage_by_id.values() if info.ended]
    if ended:
        host().acknowledge_usage(ended)


def count(team_id: str, usage_by_id: Mapping[str, UsageInfo]) -> None:
    """Count the new usage of one team's sandboxes."""
    amounts: dict[Key, float] = {}
    with transaction.atomic():
        rows = Sandbox.objects.filter(team_id=team_id, pk__in=usage_by_id).order_by("pk")
        updated: list[Sandbox] = []
        for sandbox in rows.select_for_update().only("cpu_seconds", "gb_seconds"):
            counted = ResourceUsage(sandbox.cpu_seconds, sandbox.gb_seconds)
            for day, used in uncounted_by_day(usage_by_id[sandbox.pk], counted):
                for metric, amount in by_metric(used):
                    key = Key(team_id, day, metric)
                    amounts[key] = amounts.get(key, 0.0) + amount
            total = usage_by_id[sandbox.pk].total
            sandbox.cpu_seconds = max(sandbox.cpu_seconds, total.cpu_seconds)
            sandbox.gb_seconds = max(sandbox.gb_seconds, total.gb_seconds)
            updated.append(sandbox)
        Sandbox.objects.bulk_update(updated, ["cpu_seconds", "gb_seconds"])
        usage.add(amounts)


def uncounted_by_day(
    info: UsageInfo, counted: ResourceUsage
) -> Iterator[tuple[date, ResourceUsage]]:
    """The usage of each day beyond ``counted``, which covers the earliest days first.

    Usage from before the days that the host still distinguishes goes to the first of them.
    """
    counted_up_to = ResourceUsage()
    for number, used in enumerate(info.days):
        until = counted_up_to + used + (ResourceUsage() if number else info.before)
        yield (
            used.day,
            ResourceUsage(
                amount_after(counted_up_to.cpu_seconds, until.cpu_seconds, counted.cpu_seconds),
                amount_after(counted_up_to.gb_seconds, until.gb_seconds, counted.gb_seconds),
            ),
        )
        counted_up_to = until


def amount_after(begin: float, end: float, counted: float) -> float:
    """How much of the range from ``begin`` to ``end`` is above ``counted``."""
    return max(end - max(begin, counted), 0.0)


def by_metric(used: ResourceUsage) -> tuple[tuple[Metric, float], ...]:
    """The amounts by metric."""
    return (
        (Metric.VCPU_SECONDS, used.cpu_seconds),
        (Metric.GB_SECONDS, used.gb_seconds),
    )
