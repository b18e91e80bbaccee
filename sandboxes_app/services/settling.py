"""Settling rows that are on their way to another state but have lost their driver.

Their process was killed, or gave up on a host that did not answer. What the host has decides the
row's new state, and no clock does (:mod:`orkestr_console.queue.driving`).
"""

from __future__ import annotations

import logging
import time
from typing import Any, NamedTuple

from django.db.models import Q, QuerySet, Value

from orkestr_console.core.postgres import release_connection
from orkestr_console.installation import services as installation
from orkestr_console.queue.driving import ORPHAN_GRACE_SECONDS, IsDriven
from orkestr_console.webhooks import claims, outbox
from sandboxes_app.models import (
    LIVE,
    TRANSITIONAL,
    Sandbox,
    SandboxStatus,
    Snapshot,
    SnapshotStatus,
)
from sandboxes_app.services import lifecycle, snapshots, state, volumes
from sandboxes_app.services.lifecycle import end_many, match_host
from templates_app import services as templates
from templates_app.models import Template

logger = logging.getLogger(__name__)

SANDBOX, ENDED, SNAPSHOT, TEMPLATE = "sandbox", "ended", "snapshot", "template"
DELIVERY = "delivery"
CUT_OFF = state.End("failed", SandboxStatus.FAILED, state.CUT_OFF)


class Orphan(NamedTuple):
    """A row in a transitional state, and the driver it lost."""

    kind: str
    id: str
    driver: str


def find_orphans() -> set[Orphan]:
    """The rows that nobody drives now, by one statement.

    A build without a driver is waiting for a worker, and is no orphan.
    """
    rows = (
        (SANDBOX, Sandbox.objects.filter(status__in=TRANSITIONAL)),
        (ENDED, Sandbox.objects.exclude(status__in=LIVE).exclude(driver="")),
        (SNAPSHOT, Snapshot.objects.filter(status=SnapshotStatus.CAPTURING)),
        (TEMPLATE, Template.objects.running().exclude(driver="")),
    )
    first, *others = (undriven(kind, passing) for kind, passing in rows)
    others.append(claims.stranded(DELIVERY))
    return {Orphan(*row) for row in first.union(*others, all=True)}


def undriven(kind: str, rows: QuerySet[Any]) -> QuerySet[Any, tuple[str, str, str]]:
    """The rows that nobody drives."""
    found = rows.filter(~Q(IsDriven("driver")))
    return found.order_by().values_list(Value(kind), "pk", "driver")


def settle_orphans() -> None:
    """Settle the rows that have had no driver for ``ORPHAN_GRACE_SECONDS``.

    Not while database and host don't belong together. Raises the host's errors.
    """
    orphans = find_orphans()
    # Immediately: a live driver loses nothing if another follows its build.
    for template in select_kind(orphans, TEMPLATE):
        templates.hand_off(template.id, template.driver)
    if select_kind(orphans, DELIVERY):
        outbox.wake_worker()
    orphans.difference_update(select_kind(orphans, TEMPLATE), select_kind(orphans, DELIVERY))
    if not orphans or installation.is_mismatched():
        return
    release_connection()
    # PostgreSQL may have just restarted, and live drivers take their locks again.
    time.sleep(ORPHAN_GRACE_SECONDS)
    orphans &= find_orphans()
    lifecycle.release_orphaned({orphan.id: orphan.driver for orphan in select_kind(orphans, ENDED)})
    settle_sandboxes(orphans)
    snapshots.settle_orphans([orphan.id for orphan in select_kind(orphans, SNAPSHOT)])


def settle_all() -> None:
    """Make all rows agree with the host. Raises the host's errors.

    Only for a host whose state belongs to this database.
    """
    lifecycle.reconcile()
    settle_orphans()
    templates.settle_images()
    snapshots.reconcile()
    volumes.reconcile()


def select_kind(orphans: set[Orphan], kind: str) -> list[Orphan]:
    """The orphans of one kind."""
    return [orphan for orphan in orphans if orphan.kind == kind]


def settle_sandboxes(orphans: set[Orphan]) -> None:
    """Settle orphaned sandboxes by what the host has. Raises the host's errors."""
    drivers = {orphan.id: orphan.driver for orphan in select_kind(orphans, SANDBOX)}
    if not drivers:
        return
    rows = Sandbox.objects.filter(pk__in=drivers, status__in=TRANSITIONAL)
    mine = [sandbox for sandbox in rows if sandbox.driver == drivers[sandbox.pk]]
    starting = [orphan.pk for orphan in mine if orphan.status == SandboxStatus.STARTING]
    # Their creator got no answer, will ask again, and relies on nothing being left.
    end_many(dict.fromkeys(starting, CUT_OFF), TRANSITIONAL)
    match_host([orphan for orphan in mine if orphan.pk not in starting], TRANSITIONAL)
