"""The disk space of a team's templates: what there is, and whether there is room for more."""

from __future__ import annotations

from django.db.models import Sum

from orkestr_console.accounts.limits import settling
from orkestr_console.accounts.models import Team
from orkestr_console.core.errors import PlanLimit
from templates_app.models import Template

MEGABYTE = 1_000_000
LIMIT = "template_disk_mb"


def disk_mb(team: Team) -> int:
    """The disk space of the team's images, without what they share with their bases."""
    sums = (
        Template.objects.for_team(team)
        .ready()
        .aggregate(size=Sum("size_bytes"), shared=Sum("shared_bytes"))
    )
    return int((sums["size"] or 0) - (sums["shared"] or 0)) // MEGABYTE


def why_no_room(team: Team) -> str:
    """Why another image of the team may not become ready now; blank if it may.

    How large one is is known only when it has been built. The last one may exceed the limit, but
    not all that were built at the same time. In the transaction that makes it ready.
    """
    with settling(team, LIMIT) as limits:
        try:
            limits.require_room(LIMIT, disk_mb(team))
        except PlanLimit as error:
            return error.detail
    return ""
