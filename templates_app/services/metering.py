"""Metering build seconds, once per build, and the disk space of images.

A build is counted in the transaction that settles it as ready or failed, or deletes it while it
runs. There is one such transaction per build, so it is counted exactly once.
"""

from __future__ import annotations

from datetime import datetime

from django.db.models import F, Max, Min, Q, Sum

from orkestr_console.accounts import usage
from orkestr_console.accounts.models import Metric
from orkestr_console.accounts.usage import Key
from templates_app.models import Template


def count_build(template: Template, until: datetime | None = None) -> None:
    """Count a build from its first event to its last, or to ``until``; by host time.

    A build that the host never started counts for nothing, and neither does waiting for room.
    """
    span = template.events.aggregate(
        begin=Min("at", filter=Q(host_seq__isnull=False)), end=Max("at")
    )
    if span["begin"] is not None:
        end = until or span["end"]
        usage.add(usage.seconds_by_day(template.team_id, Metric.BUILD_SECONDS, span["begin"], end))


def note_image_bytes(team_id: str | None = None) -> None:
    """Record the current size of every team's images, or one team's; a day keeps its peak."""
    today = usage.today()
    ready = Template.objects.ready().filter(size_bytes__isnull=False)
    if team_id is not None:
        ready = ready.filter(team_id=team_id)
    sums = ready.values("team_id").annotate(
        own=Sum(F("size_bytes") - F("shared_bytes")), shared=Sum("shared_bytes")
    )
    amounts: dict[Key, float] = {}
    for row in sums:
        amounts[Key(row["team_id"], today, Metric.IMAGE_BYTES)] = max(float(row["own"] or 0), 0.0)
        amounts[Key(row["team_id"], today, Metric.SHARED_BYTES)] = float(row["shared"] or 0)
    usage.raise_maximum(amounts)
