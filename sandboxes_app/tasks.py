"""What the workers do for sandboxes. Each may run twice safely."""

from __future__ import annotations

import logging

from hostruntime.errors import HostError
from orkestr_console.services.hosts import host
from sandboxes_app.services import lifecycle

logger = logging.getLogger(__name__)


def release_sandbox(sandbox_id: str) -> None:
    """Free the container of a sandbox that has ended; the reconcile pass tries again."""
    try:
        host().delete_sandbox(sandbox_id)
    except HostError as error:
        logger.warning("sandbox %s stays until the next pass: %s", sandbox_id, error.detail)


def tidy() -> None:
    """Every minute: settle what has expired, then make rows and containers agree."""
    lifecycle.expire_due()
    try:
        lifecycle.reconcile()
    except HostError as error:
        logger.warning("sandboxes were not reconciled: %s", error.detail)
