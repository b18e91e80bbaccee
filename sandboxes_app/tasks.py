"""What the workers do for sandboxes. Each may run twice safely."""

from __future__ import annotations

import logging
import time

from hostruntime.errors import HostError
from hostruntime.patience import Patience
from orkestr_console.installation import services as installation
from orkestr_console.postgres import let_go
from orkestr_console.services.hosts import host
from sandboxes_app.services import lifecycle, metering, pausing, snapshots, standing
from templates_app.services import note_image_bytes, settle_images

logger = logging.getLogger(__name__)
# A host that is still starting takes up its containers first.
HOST_SECONDS = 60


def release_sandbox(sandbox_id: str) -> None:
    """Free the container of a sandbox that has ended; the reconcile pass tries again."""
    try:
        host().delete_sandbox(sandbox_id)
        metering.collect(sandbox_id)
    except HostError as error:
        logger.warning("sandbox %s stays until the next pass: %s", sandbox_id, error.detail)


def settle_at_start() -> None:
    """When the workers start: tidy at once, or as soon as the host answers.

    The schedule first looks after half a minute, in which rows would name what a reboot ended.
    """
    patience = Patience(HOST_SECONDS)
    while not tidy() and not patience.spent():
        let_go()
        time.sleep(1)


def tidy() -> bool:
    """Every minute: settle what has expired, make rows and containers agree, count what is used.

    False if the host did not answer.
    """
    answers = True
    try:
        if not installation.agree(standing.knows_some):
            # What the rows say is of another state: nothing is settled, and nothing released.
            return True
    except HostError as error:
        logger.warning("sandboxes were not reconciled: %s", error.detail)
        answers = False
    lifecycle.expire_due()
    note_image_bytes()
    if answers:
        reconcile()
    return answers


def reconcile() -> None:
    """Make what the rows say and what is on the host agree."""
    try:
        settle_images()
        lifecycle.reconcile()
        pausing.settle_half_way()
        metering.collect()
        snapshots.reconcile()
    except HostError as error:
        logger.warning("sandboxes were not reconciled: %s", error.detail)
