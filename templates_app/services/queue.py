"""Whose build is next: fair between teams, each no more at once than its plan allows.

Nor are there more at once than this machine has room for (``settings.BUILDS_AT_ONCE``). Of those
that wait the one begins whose *turn* is lowest: how many of its team's builds run or stand before
it. Of equal turns the oldest goes first. So a team that asks for fifty builds gets no more of the
machine than one that asks for two, and nobody waits for ever.

There is a task in the queue for each build that was asked for, but it only says that a worker is
to look. A build is taken on its row, so a task that runs twice takes nothing twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Literal

from django.conf import settings
from django.db import connection, transaction
from django.db.models import Q
from django.db.models.functions import Coalesce, Now
from django_q.tasks import async_task

from orkestr_console.accounts.limits import envelope
from orkestr_console.accounts.models import Team
from orkestr_console.queue.driving import IsDriven
from templates_app.models import Template, TemplateStatus

# The advisory lock of those who take a build: the bytes of "build".
CLAIM_LOCK = 0x6275696C64
DRIVE = "templates_app.tasks.drive_builds"


@dataclass(frozen=True)
class QueuePosition:
    """Where a queued build stands: 1 is next. ``waits_for`` says what has to end first."""

    number: int
    waits_for: Literal["team", "host"]


@dataclass(frozen=True)
class QueuedBuild:
    """A queued build, and how many of its team's builds run or stand before it."""

    template: str
    team: str
    turn: int


def wake_worker() -> None:
    """Have a worker look which builds may begin, when the transaction commits."""
    async_task(DRIVE, group="builds")


def hand_off(template_id: str, driver: str) -> None:
    """A driver does not go on with a build that still builds: another one shall, at once."""
    with transaction.atomic():
        mine = Template.objects.building().filter(pk=template_id, driver=driver)
        if mine.update(driver=""):
            wake_worker()


def wake_for_next() -> None:
    """A build has ended: the next may begin, if one waits."""
    if Template.objects.queued().exists():
        wake_worker()


def claim_next(driver: str) -> Template | None:
    """Take the build whose turn it is; None if there is none that may run.

    A build that lost its driver comes before those that never had one. Takers are one at a time,
    so that none of them counts a team's builds while another adds to them.
    """
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_xact_lock(%s)", [CLAIM_LOCK])
        template_id = orphaned_build() or next_queued()
        if template_id is None or not assign_driver(template_id, driver):
            return None
    return Template.objects.select_related("team__plan").get(pk=template_id)


def assign_driver(template_id: str, driver: str) -> bool:
    """Write ``driver`` on a building row that has no live one; whether that came about."""
    free = Template.objects.filter(is_undriven(), pk=template_id, status=TemplateStatus.BUILDING)
    return bool(free.update(driver=driver, started_at=Coalesce("started_at", Now())))


def is_undriven() -> Q:
    """Builds that nobody follows now: they have no driver, or it is gone."""
    return ~Q(IsDriven("driver"))


def orphaned_build() -> str | None:
    """The oldest build that has begun and lost its driver, or None."""
    rows = Template.objects.running().filter(is_undriven()).order_by("created_at", "pk")
    return rows.values_list("pk", flat=True).first()


def next_queued() -> str | None:
    """The queued build that may begin, or None."""
    if Template.objects.running().count() >= settings.BUILDS_AT_ONCE:
        return None
    limit = cache(lambda team: envelope(Team(pk=team)).value("max_concurrent_builds"))
    for queued_build in queue_order():
        if queued_build.turn < limit(queued_build.team):
            return queued_build.template
    return None


def queue_order() -> list[QueuedBuild]:
    """Every queued build, the next first."""
    running = Template.objects.running().values_list("team_id", flat=True)
    queued = Template.objects.queued().order_by("created_at", "pk").values_list("pk", "team_id")
    # Sorting is stable: among equal turns the oldest stays first.
    return sorted(number_turns(queued, Counter(running)), key=lambda waiting: waiting.turn)


def number_turns(queued: Iterable[tuple[str, str]], before: Counter[str]) -> Iterable[QueuedBuild]:
    """Number each team's builds, given oldest first, on from those that run."""
    for template, team in queued:
        yield QueuedBuild(template, team, before[team])
        before[team] += 1


def queue_position(template: Template) -> QueuePosition | None:
    """Where a queued build stands; None for one that is not queued."""
    if not template.is_queued:
        return None
    limit = envelope(template.team).value("max_concurrent_builds")
    for number, queued_build in enumerate(queue_order(), start=1):
        if queued_build.template == template.pk:
            return QueuePosition(number, "team" if queued_build.turn >= limit else "host")
    return None
