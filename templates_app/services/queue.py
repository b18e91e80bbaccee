"""Which build is next: fair between teams, and within each plan's limit.

No more builds run at once than this machine has room for (``settings.BUILDS_AT_ONCE``). Of the
queued builds, the one with the lowest *turn* starts: the number of its team's builds that run or
are queued before it. Among equal turns the oldest goes first. So a team that requests fifty builds
gets no more of the machine than one that requests two, and nobody waits for ever.

Each requested build puts a task into the queue, but the task only makes a worker check. A build is
claimed on its row, so a task that runs twice claims nothing twice.
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

# The advisory lock for claiming a build: the bytes of "build".
CLAIM_LOCK = 0x6275696C64
DRIVE = "templates_app.tasks.drive_builds"


@dataclass(frozen=True)
class QueuePosition:
    """A queued build's position: 1 is next. ``waits_for`` is what has to finish first."""

    number: int
    waits_for: Literal["team", "host"]


@dataclass(frozen=True)
class QueuedBuild:
    """A queued build, and how many of its team's builds run or are queued before it."""

    template: str
    team: str
    turn: int


def wake_worker() -> None:
    """Have a worker check which builds can start, once the transaction commits."""
    async_task(DRIVE, group="builds")


def hand_off(template_id: str, driver: str) -> None:
    """Release a build that is still running, for another driver to claim immediately."""
    with transaction.atomic():
        mine = Template.objects.building().filter(pk=template_id, driver=driver)
        if mine.update(driver=""):
            wake_worker()


def wake_for_next() -> None:
    """Wake a worker if any build is queued: one has finished."""
    if Template.objects.queued().exists():
        wake_worker()


def claim_next(driver: str) -> Template | None:
    """Claim the build whose turn it is; None if none can run.

    A build that lost its driver comes before those that never had one. Claims are serialized, so
    that none counts a team's builds while another adds to them.
    """
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_xact_lock(%s)", [CLAIM_LOCK])
        template_id = orphaned_build() or next_queued()
        if template_id is None or not assign_driver(template_id, driver):
            return None
    return Template.objects.select_related("team__plan").get(pk=template_id)


def assign_driver(template_id: str, driver: str) -> bool:
    """Assign ``driver`` to a building row that has no live one; whether it did."""
    free = Template.objects.filter(is_undriven(), pk=template_id, status=TemplateStatus.BUILDING)
    return bool(free.update(driver=driver, started_at=Coalesce("started_at", Now())))


def is_undriven() -> Q:
    """A filter for builds that nobody follows: they have no driver, or it is gone."""
    return ~Q(IsDriven("driver"))


def orphaned_build() -> str | None:
    """The oldest running build that lost its driver, or None."""
    rows = Template.objects.running().filter(is_undriven()).order_by("created_at", "pk")
    return rows.values_list("pk", flat=True).first()


def next_queued() -> str | None:
    """The queued build that can start, or None."""
    if Template.objects.running().count() >= settings.BUILDS_AT_ONCE:
        return None
    limit = cache(lambda team: envelope(Team(pk=team)).value("max_concurrent_builds"))
    for queued_build in queue_order():
        if queued_build.turn < limit(queued_build.team):
            return queued_build.template
    return None


def queue_order() -> list[QueuedBuild]:
    """Every queued build, the next one first."""
    running = Template.objects.running().values_list("team_id", flat=True)
    queued = Template.objects.queued().order_by("created_at", "pk").values_list("pk", "team_id")
    # Sorting is stable: among equal turns the oldest stays first.
    return sorted(number_turns(queued, Counter(running)), key=lambda waiting: waiting.turn)


def number_turns(queued: Iterable[tuple[str, str]], before: Counter[str]) -> Iterable[QueuedBuild]:
    """Number each team's queued builds, oldest first, after those that run."""
    for template, team in queued:
        yield QueuedBuild(template, team, before[team])
        before[team] += 1


def queue_position(template: Template) -> QueuePosition | None:
    """A queued build's position; None for one that is not queued."""
    if not template.is_queued:
        return None
    limit = envelope(template.team).value("max_concurrent_builds")
    for number, queued_build in enumerate(queue_order(), start=1):
        if queued_build.template == template.pk:
            return QueuePosition(number, "team" if queued_build.turn >= limit else "host")
    return None
