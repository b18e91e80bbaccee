"""Counting sandboxes' usage, exactly once.

The host reports totals that only grow, by day. The part already counted is on the sandbox's row,
and both change in one transaction under the row's lock: a collector that crashes, or runs twice, or
next to another, adds nothing twice. Only after the commit may the host forget.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import date
from functools import cache

from django.db import connection, transaction

from hostruntime.client.host_client import HostClient
from hostruntime.wire.sandboxes import ResourceUsage, UsageInfo
from orkestr_console.accounts import usage
from orkestr_console.accounts.models import Metric
from orkestr_console.accounts.usage import Key
from orkestr_console.core.hosts import Steps, ask, in_steps
from orkestr_console.core.rows import quoted
from sandboxes_app.models import Sandbox
from sandboxes_app.services import state

# Remembers what has been counted if that is still what it was, and only then adds the rest.
COUNT_LAST_SQL = """
WITH counted AS (
    UPDATE {table} SET cpu_seconds = %(cpu)s, gb_seconds = %(gb)s,
        driver = CASE driver WHEN %(driver)s THEN '' ELSE driver END
    WHERE id = %(id)s AND cpu_seconds = %(cpu_before)s AND gb_seconds = %(gb_before)s RETURNING id
), added AS ({usage})
SELECT id FROM counted
"""


# Ended sandboxes that this process has counted and the host still knows. It is told with the next
# deletion; of those that it is never told of, the next pass of collect() finds nothing to count.
_counted: deque[str] = deque(maxlen=1000)
MAX_COLLECTED = 32


@in_steps
def collect() -> Steps[None]:
    """Count the usage of all sandboxes; safe at any time. Raises the host's errors."""
    infos = yield from ask(HostClient.usage)
    usage_by_id = {info.id: info for info in infos}
    count_all(usage_by_id)
    # One without a row belongs to nobody, and is forgotten as well.
    ended = [info.id for info in usage_by_id.values() if info.ended]
    if ended:
        yield from ask(HostClient.acknowledge_usage, ended)


def count_all(usage_by_id: Mapping[str, UsageInfo]) -> None:
    """Count the new usage of these sandboxes, team by team."""
    rows = Sandbox.objects.filter(pk__in=usage_by_id)
    for team_id in sorted(set(rows.values_list("team_id", flat=True))):
        count(team_id, usage_by_id)


def take_counted() -> list[str]:
    """Some ended sandboxes that have been counted, for the host to forget; each is named once."""
    taken: list[str] = []
    with suppress(IndexError):
        while len(taken) < MAX_COLLECTED:
            taken.append(_counted.popleft())
    return taken


def count_deleted(info: UsageInfo | None) -> None:
    """Count what the host answers to a deletion."""
    if info is not None:
        count_all({info.id: info})
        _note_counted(info)


def _note_counted(info: UsageInfo) -> None:
    if info.ended:
        _counted.append(info.id)


def count(team_id: str, usage_by_id: Mapping[str, UsageInfo]) -> None:
    """Count the new usage of one team's sandboxes."""
    amounts: dict[Key, float] = {}
    with transaction.atomic():
        rows = Sandbox.objects.filter(team_id=team_id, pk__in=usage_by_id).order_by("pk")
        updated: list[Sandbox] = []
        for sandbox in rows.select_for_update().only("team_id", "cpu_seconds", "gb_seconds"):
            for key, amount in uncounted(sandbox, usage_by_id[sandbox.pk]):
                amounts[key] = amounts.get(key, 0.0) + amount
            total = counted_then(sandbox, usage_by_id[sandbox.pk])
            sandbox.cpu_seconds, sandbox.gb_seconds = total.cpu_seconds, total.gb_seconds
            updated.append(sandbox)
        Sandbox.objects.bulk_update(updated, ["cpu_seconds", "gb_seconds"])
        usage.add(amounts)


def count_ended(sandbox: Sandbox, info: UsageInfo | None, driver: str) -> None:
    """Count the usage of a sandbox that has just ended, and clear its ``driver``.

    ``info`` is what the host answers to its deletion.
    """
    if info is None or not count_last(sandbox, info, driver):
        count_deleted(info)
        state.mark_released([sandbox.pk], driver)
    else:
        _note_counted(info)


def count_last(sandbox: Sandbox, info: UsageInfo, driver: str) -> bool:
    """Do both in one statement; False if somebody has counted since ``sandbox`` was read."""
    total = counted_then(sandbox, info)
    amounts = {key: amount for key, amount in uncounted(sandbox, info) if amount > 0}
    with connection.cursor() as cursor:
        cursor.execute(
            count_last_sql(),
            {
                "id": sandbox.pk,
                "driver": driver,
                "cpu_before": sandbox.cpu_seconds,
                "gb_before": sandbox.gb_seconds,
                "cpu": total.cpu_seconds,
                "gb": total.gb_seconds,
                **usage.parameters(amounts),
            },
        )
        return cursor.fetchone() is not None


@cache
def count_last_sql() -> str:
    """The statement of :func:`count_last`."""
    added = usage.addition_sql("EXISTS (SELECT FROM counted)")
    return COUNT_LAST_SQL.format(table=quoted(Sandbox._meta.db_table), usage=added)


def counted_then(sandbox: Sandbox, info: UsageInfo) -> ResourceUsage:
    """What has been counted once ``info`` is."""
    return ResourceUsage(
        max(sandbox.cpu_seconds, info.total.cpu_seconds),
        max(sandbox.gb_seconds, info.total.gb_seconds),
    )


def uncounted(sandbox: Sandbox, info: UsageInfo) -> Iterator[tuple[Key, float]]:
    """The amounts beyond what has been counted on the row."""
    counted = ResourceUsage(sandbox.cpu_seconds, sandbox.gb_seconds)
    for day, used in uncounted_by_day(info, counted):
        for metric, amount in by_metric(used):
            yield Key(sandbox.team_id, day, metric), amount


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
