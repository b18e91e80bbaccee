"""Settling what is on its way to another state while nobody drives it there any more.

A process was killed, or gave up on a host that did not answer. What the row then says is decided
by what the host has, and by nothing that a clock says (:mod:`orkestr_console.queue.driving`).
"""

from __future__ import annotations

import logging
import time
from typing import Any, NamedTuple

from django.db.models import Q, QuerySet, Value

from orkestr_console.core.postgres import let_go
from orkestr_console.installation import services as installation
from orkestr_console.queue.driving import SURE_SECONDS, IsDriven
from sandboxes_app.models import LIVE, PASSING, Sandbox, SandboxStatus, Snapshot, SnapshotStatus
from sandboxes_app.services import lifecycle, snapshots, state
from sandboxes_app.services.lifecycle import end_all, say_as_on_host
from templates_app import services as templates
from templates_app.models import Template

logger = logging.getLogger(__name__)

SANDBOX, ENDED, SNAPSHOT, TEMPLATE = "sandbox", "ended", "snapshot", "template"
CUT_OFF = state.End("failed", SandboxStatus.FAILED, state.CUT_OFF)


class Left(NamedTuple):
    """A row on its way, and who drove it."""

    kind: str
    id: str
    driver: str


def left() -> set[Left]:
    """What nobody drives just now, by one statement.

    A build that has no driver waits for a worker, and is not left.
    """
    rows = (
        (SANDBOX, Sandbox.objects.filter(status__in=PASSING)),
        (ENDED, Sandbox.objects.exclude(status__in=LIVE).exclude(driver="")),
        (SNAPSHOT, Snapshot.objects.filter(status=SnapshotStatus.CAPTURING)),
        (TEMPLATE, Template.objects.running().exclude(driver="")),
    )
    first, *others = (not_driven(kind, passing) for kind, passing in rows)
    return {Left(*row) for row in first.union(*others, all=True)}


def not_driven(kind: str, passing: QuerySet[Any]) -> QuerySet[Any, tuple[str, str, str]]:
    """Those among the rows that nobody drives."""
    found = passing.filter(~Q(IsDriven("driver")))
    return found.order_by().values_list(Value(kind), "pk", "driver")


def settle_left() -> None:
    """Settle what nobody drives and nobody drove a moment before.

    Not while database and host do not belong together. Raises the host's errors.
    """
    found = left()
    # At once: a driver that lives loses nothing when another follows its build.
    for template in of_kind(found, TEMPLATE):
        templates.pass_on(template.id, template.driver)
    found.difference_update(of_kind(found, TEMPLATE))
    if not found or installation.is_apart():
        return
    let_go()
    # PostgreSQL may have restarted just now, and those who drive take their locks again.
    time.sleep(SURE_SECONDS)
    found &= left()
    lifecycle.release_left({one.id: one.driver for one in of_kind(found, ENDED)})
    settle_sandboxes(found)
    snapshots.settle_left([one.id for one in of_kind(found, SNAPSHOT)])


def settle_all() -> None:
    """Make all rows and the host agree. Raises the host's errors.

    For a host whose state is this database's.
    """
    lifecycle.reconcile()
    settle_left()
    templates.settle_images()
    snapshots.reconcile()


def of_kind(found: set[Left], kind: str) -> list[Left]:
    """Those of one kind."""
    return [one for one in found if one.kind == kind]


def settle_sandboxes(found: set[Left]) -> None:
    """Settle those sandboxes, by what the host has of each. Raises the host's errors."""
    drivers = {one.id: one.driver for one in of_kind(found, SANDBOX)}
    if not drivers:
        return
    rows = Sandbox.objects.filter(pk__in=drivers, status__in=PASSING)
    mine = [sandbox for sandbox in rows if sandbox.driver == drivers[sandbox.pk]]
    starting = [one.pk for one in mine if one.status == SandboxStatus.STARTING]
    # Nobody was told of it: who asked for it asks again, and counts on nothing being left.
    end_all(dict.fromkeys(starting, CUT_OFF), PASSING)
    say_as_on_host([one for one in mine if one.pk not in starting], PASSING)
