"""Counting build seconds, once for each build, and how much disk the images take.

A build is counted in the transaction that ends it: settled as ready or failed, or deleted while
it runs. There is one such transaction for each build, so it is counted exactly once.
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

    One that the host never began told nothing and counts for nothing; waiting for room neither.
    """
    span = template.events.aggregate(
        begin=Min("at", filter=Q(host_seq__isnull=False)), end=Max("at")
    )
    if span["begin"] is not None:
        end = until or span["end"]
        usage.add(usage.spread(template.team_id, Metric.BUILD_SECONDS, span["begin"], end))


def note_image_bytes(team_id: str | None = None) -> None:
    """Note how much the images of every team take now, or of one; the day keeps its most."""
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
    usage.raise_to(amounts)
