"""Worker tasks for sandboxes. Each is safe to run twice."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from django.db import connection

from hostruntime.errors import HostError
from orkestr_console.core.hosts import host
from orkestr_console.installation import services as installation
from sandboxes_app.services import lifecycle, metering, settling, standing, transfers
from sandboxes_app.services.listening import Listener
from templates_app.services import note_image_bytes

logger = logging.getLogger(__name__)
# The delay before an unreachable host or database is tried again.
RETRY_SECONDS = 1.0
MAX_COUNTED_SINGLY = 20


def listen(beat: Callable[[], None]) -> None:
    """Receive the host's changes, for ever, in a process of its own; calls ``beat`` every round.

    Failures are retried. The first round makes all rows agree with the host: after a start, the
    schedule runs only after half a minute.
    """
    listener, healthy = Listener(), True
    while True:
        beat()
        try:
            listener.poll()
        except Exception as error:
            if healthy:
                known = isinstance(error, HostError)
                logger.warning("cannot poll the host: %s", error, exc_info=not known)
            healthy = False
            connection.close()
            time.sleep(RETRY_SECONDS)
        else:
            healthy = True


def release_sandbox(sandbox_id: str) -> None:
    """Release the container of a sandbox that has ended; the reconcile pass retries."""
    release_sandboxes([sandbox_id])


def release_sandboxes(sandbox_ids: Sequence[str]) -> None:
    """Release what the host has of sandboxes that have ended, and count their usage."""
    # Counting all sandboxes takes one request to the host, but locks all their rows.
    singly = len(sandbox_ids) <= MAX_COUNTED_SINGLY
    try:
        for sandbox_id in sandbox_ids:
            info = host().delete_sandbox(sandbox_id, metering.take_counted())
            if singly:
                metering.count_deleted(info)
        if not singly:
            metering.collect()
    except HostError as error:
        logger.warning("could not release ended sandboxes; the next pass retries: %s", error.detail)


def tidy() -> None:
    """Every minute: settle expired sandboxes, make rows and containers agree, and count usage.

    The passes are independent: an exception in one doesn't keep the others from running.
    """
    host_reachable = True
    try:
        if not installation.agree(standing.has_known_objects):
            # The rows belong to another state directory: settle nothing, release nothing.
            return
    except HostError as error:
        logger.warning("could not reconcile sandboxes: %s", error.detail)
        host_reachable = False
    _run_pass("could not expire sandboxes", lifecycle.expire_overdue)
    _run_pass("could not record image sizes", note_image_bytes)
    _run_pass("could not forget used addresses", transfers.forget_expired)
    if host_reachable:
        reconcile()


def reconcile() -> None:
    """Make the rows agree with the host."""
    _run_pass("could not reconcile sandboxes", settling.settle_all)
    _run_pass("could not collect usage", metering.collect)


def _run_pass(failure: str, work: Callable[[], object]) -> None:
    try:
        work()
    except HostError as error:
        logger.warning("%s: %s", failure, error.detail)
    except Exception:
        logger.exception("%s: a bug", failure)
