"""The only place where a sandbox's status changes: compare, set, and say so in one transaction."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from django.db import transaction
from django.utils import timezone

from hostruntime.answers import SandboxInfo
from orkestr_console.postgres import persistently
from sandboxes_app.events import tell_changed
from sandboxes_app.models import LIVE, Sandbox, SandboxEvent, SandboxStatus

LOST = "The host lost this sandbox: it restarted, or the container went away."
EXITED = (
    "The sandbox's own processes ended it, most likely because it ran out of memory. Choose a "
    "larger size if so."
)


def change(
    sandbox: Sandbox,
    kind: str,
    *,
    among: Iterable[str],
    to: SandboxStatus,
    data: dict[str, Any] | None = None,
    **fields: Any,
) -> bool:
    """Move ``sandbox`` to ``to`` if it is in one of ``among``; whether it was.

    The event row and the notice are in the same transaction. The object is brought up to date.
    """
    with transaction.atomic():
        rows = Sandbox.objects.select_for_update().filter(pk=sandbox.pk, status__in=among)
        before = rows.values_list("status", flat=True).first()
        if before is None:
            return False
        Sandbox.objects.filter(pk=sandbox.pk).update(status=to, **fields)
        SandboxEvent.objects.create(
            sandbox=sandbox, kind=kind, from_status=before, to_status=to, data=data or {}
        )
        tell_changed(sandbox.pk, sandbox.team_id)
    for name, value in {"status": to, **fields}.items():
        setattr(sandbox, name, value)
    return True


def settle(sandbox: Sandbox, kind: str, *, to: SandboxStatus, **changes: Any) -> bool:
    """The same for what has happened on the host already, however long the database is away.

    Done again because the answer was lost, it finds the row as it should be, which counts.
    """
    tries = 0

    def once() -> bool:
        nonlocal tries
        tries += 1
        if change(sandbox, kind, to=to, **changes):
            return True
        return tries > 1 and Sandbox.objects.filter(pk=sandbox.pk, status=to).exists()

    return persistently(once)


def started(sandbox: Sandbox, info: SandboxInfo) -> bool:
    """It runs."""
    return settle(
        sandbox,
        "running",
        among=[SandboxStatus.STARTING],
        to=SandboxStatus.RUNNING,
        started_at=timezone.now(),
        boot_ms=info.boot_ms,
    )


def prolonged(sandbox: Sandbox, expires_at: datetime) -> bool:
    """It runs on, until another moment."""
    return settle(
        sandbox,
        "timeout_set",
        among=[SandboxStatus.RUNNING],
        to=SandboxStatus.RUNNING,
        data={"expires_at": expires_at.isoformat()},
        expires_at=expires_at,
    )


def pausing(sandbox: Sandbox) -> bool:
    """It is about to stand still."""
    return change(sandbox, "pausing", among=[SandboxStatus.RUNNING], to=SandboxStatus.PAUSING)


def unpaused(sandbox: Sandbox) -> bool:
    """It could not be paused, and runs on."""
    return settle(sandbox, "pause_failed", among=[SandboxStatus.PAUSING], to=SandboxStatus.RUNNING)


def paused(sandbox: Sandbox, until: datetime) -> bool:
    """It stands still, and ends then unless it is resumed."""
    among = [SandboxStatus.PAUSING, SandboxStatus.RESUMING]
    return settle(
        sandbox,
        "paused",
        among=among,
        to=SandboxStatus.PAUSED,
        data={"until": until.isoformat()},
        expires_at=until,
    )


def resuming(sandbox: Sandbox) -> bool:
    """It is about to run on."""
    return change(sandbox, "resuming", among=[SandboxStatus.PAUSED], to=SandboxStatus.RESUMING)


def still_paused(sandbox: Sandbox) -> bool:
    """It could not be resumed."""
    return settle(sandbox, "resume_failed", among=[SandboxStatus.RESUMING], to=SandboxStatus.PAUSED)


def resumed(sandbox: Sandbox, expires_at: datetime) -> bool:
    """It runs on: a new stretch, until another moment."""
    among = [SandboxStatus.PAUSING, SandboxStatus.RESUMING]
    return settle(
        sandbox,
        "resumed",
        among=among,
        to=SandboxStatus.RUNNING,
        data={"expires_at": expires_at.isoformat()},
        started_at=timezone.now(),
        expires_at=expires_at,
    )


def ended(sandbox: Sandbox, kind: str) -> bool:
    """It ended as it should: ``terminated`` by somebody, or ``expired``."""
    return change(sandbox, kind, among=LIVE, to=SandboxStatus.TERMINATED, ended_at=timezone.now())


def never_started(sandbox: Sandbox) -> bool:
    """Who was to start it is gone."""
    return broken(sandbox, LOST, among=[SandboxStatus.STARTING])


def broken(sandbox: Sandbox, message: str, among: Iterable[str] = LIVE) -> bool:
    """It ended as it should not."""
    return settle(
        sandbox,
        "failed",
        among=among,
        to=SandboxStatus.FAILED,
        data={"reason": message},
        ended_at=timezone.now(),
        error_message=message,
    )


def gone(sandbox: Sandbox, info: SandboxInfo | None) -> bool:
    """Settle a sandbox whose container is no more, by what the host knows of it."""
    if info is not None and info.reason == "expired":
        return ended(sandbox, "expired")
    return broken(sandbox, EXITED if info is not None and info.reason == "exited" else LOST)
