"""Reading the audit log: a team's entries, filtered, newest first."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta
from typing import Annotated, Literal

from django.db.models import Q, QuerySet
from pydantic import BaseModel, ConfigDict, Field

from orkestr_console.accounts.actor import Actor
from orkestr_console.accounts.models import AuditEntry, Role

PAGE = 50
# An export is built in memory; for more, narrow the dates.
MAX_EXPORTED = 50_000

type Text = Annotated[str, Field(max_length=254)]
# The last day of ``date`` is excluded: it has no midnight after it.
type Day = Annotated[date, Field(ge=date(1970, 1, 1), le=date(9999, 12, 30))]


class AuditQuery(BaseModel):
    """A filter. Blank matches anything; days are in UTC, both inclusive."""

    model_config = ConfigDict(extra="forbid", str_strip_whitespace=True)

    who: Text = ""
    action: Text = ""
    outcome: Literal["", "done", "denied"] = ""
    surface: Literal["", "console", "rest", "mcp", "system"] = ""
    since: Day | None = None
    until: Day | None = None
    text: Text = ""


def entries(actor: Actor, query: AuditQuery) -> QuerySet[AuditEntry]:
    """The team's entries that match, newest first. Raises ``Forbidden`` for a member."""
    actor.require_role(Role.ADMIN)
    rows = AuditEntry.objects.filter(team_id=actor.team.pk)
    exact = {"outcome": query.outcome, "surface": query.surface, "action": query.action}
    rows = rows.filter(**{name: value for name, value in exact.items() if value})
    if query.who:
        rows = rows.filter(Q(who__icontains=query.who) | Q(token__startswith=query.who))
    if query.text:
        named = Q(object_name__icontains=query.text) | Q(object_id__icontains=query.text)
        rows = rows.filter(named | Q(detail__icontains=query.text))
    if query.since:
        rows = rows.filter(at__gte=midnight(query.since))
    if query.until:
        rows = rows.filter(at__lt=midnight(query.until) + timedelta(days=1))
    return rows.order_by("-id")


def midnight(day: date) -> datetime:
    """The start of a day in UTC."""
    return datetime.combine(day, time(), UTC)


def page(
    actor: Actor, query: AuditQuery, before: int | None
) -> tuple[list[AuditEntry], int | None]:
    """A page of entries older than entry ``before``, and the next page's ``before`` or None."""
    rows = entries(actor, query)
    if before is not None:
        rows = rows.filter(id__lt=before)
    found = list(rows[: PAGE + 1])
    return found[:PAGE], found[PAGE - 1].pk if len(found) > PAGE else None


def actions(actor: Actor) -> list[str]:
    """The actions that occur in the team's log."""
    actor.require_role(Role.ADMIN)
    rows = AuditEntry.objects.filter(team_id=actor.team.pk)
    return list(rows.order_by("action").values_list("action", flat=True).distinct())


def export_entries(actor: Actor, query: AuditQuery) -> Iterator[AuditEntry]:
    """All matching entries, newest first, up to ``MAX_EXPORTED``."""
    return entries(actor, query)[:MAX_EXPORTED].iterator(chunk_size=2000)
