"""What the workers do for sandboxes. Each may run twice safely."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from django.db import connection

from hostruntime.errors import HostError
from orkestr_console.core.hosts import host
from orkestr_console.installation import services as installation
from sandboxes_app.services import lifecycle, metering, settling, standing
from sandboxes_app.services.listening import Listener
from templates_app.services import note_image_bytes

logger = logging.getLogger(__name__)
# Before the host or the database, which cannot be reached, is tried again.
RETRY_SECONDS = 1.0
MAX_COUNTED_SINGLY = 20


def listen(beat: Callable[[], None]) -> None:
    """Hear what has ended, for ever, in a process of its own; ``beat`` is called each round.

    What does not answer is tried again. The first round makes all rows agree with the host: after
    a start the schedule first looks after half a minute.
    """
    listener, healthy = Listener(), True
    while True:
        beat()
        try:
            listener.poll()
        except Exception as error:
            if healthy:
                known = isinstance(error, HostError)
                logger.warning("nothing is heard of the host: %s", error, exc_info=not known)
            healthy = False
            connection.close()
            time.sleep(RETRY_SECONDS)
        else:
            healthy = True


def release_sandbox(sandbox_id: str) -> None:
    """Free the container of a sandbox that has ended; the reconcile pass tries again."""
    release_sandboxes([sandbox_id])


def release_sandboxes(sandbox_ids: Sequence[str]) -> None:
    """Free what the host has of sandboxes that have ended, and count what they used."""
    # To count for all that there are is one answer of the host's, but has all their rows locked.
    singly = len(sandbox_ids) <= MAX_COUNTED_SINGLY
    try:
        for sandbox_id in sandbox_ids:
            host().delete_sandbox(sandbox_id)
            if singly:
                metering.collect(sandbox_id)
        if not singly:
            metering.collect()
    except HostError as error:
        logger.warning("ended sandboxes stay until the next pass: %s", error.detail)


def tidy() -> None:
    """Every minute: settle what has expired, make rows and containers agree, count what is used.

    Each pass stands alone: what one of them raises keeps no other from its turn.
    """
    host_reachable = True
    try:
        if not installation.agree(standing.has_known_objects):
            # What the rows say is of another state: nothing is settled, and nothing released.
            return
    except HostError as error:
        logger.warning("sandboxes were not reconciled: %s", error.detail)
        host_reachable = False
    _run_pass("what has expired was not ended", lifecycle.expire_overdue)
    _run_pass("the room that images take was not counted", note_image_bytes)
    if host_reachable:
        reconcile()


def reconcile() -> None:
    """Make what the rows say and what is on the host agree."""
    _run_pass("sandboxes were not reconciled", settling.settle_all)
    _run_pass("what sandboxes use was not collected", metering.collect)


def _run_pass(failure: str, work: Callable[[], object]) -> None:
    try:
        work()
    except HostError as error:
        logger.warning("%s: %s", failure, error.detail)
    except Exception:
        logger.exception("%s, by a defect", failure)
