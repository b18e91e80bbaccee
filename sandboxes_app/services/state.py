"""The only place where a sandbox's status changes: compare, set, and say so in one transaction."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from django.db import transaction
from django.utils import timezone

from hostruntime.wire.sandboxes import SandboxInfo
from orkestr_console.core.postgres import persistently
from sandboxes_app.events import tell_all_changed, tell_changed
from sandboxes_app.models import LIVE, Sandbox, SandboxEvent, SandboxStatus

LOST = "The host lost this sandbox: it restarted, or the container went away."
EXITED = (
    "The sandbox's own processes ended it, most likely because it ran out of memory. Choose a "
    "larger size if so."
)
OUT_OF_DISK = (
    "The machine's disk was running out, and this sandbox took more of it than the others, so it "
    "was ended. Ask the operator for room, or write less to its disk, before you run it again."
)


CUT_OFF = (
    "The server was stopped while the sandbox was started. Nothing of it is left; create another."
)


@dataclass(frozen=True)
class End:
    """How a sandbox ended: the event, the status, and why if it is not as it should be."""

    kind: str
    to: SandboxStatus
    message: str = ""


def change(
    sandbox: Sandbox,
    kind: str,
    *,
    among: Iterable[str],
    to: SandboxStatus,
    data: dict[str, Any] | None = None,
    seen: int | None = None,
    driver: str = "",
    **fields: Any,
) -> bool:
    """Move ``sandbox`` to ``to`` if it is in one of ``among``; whether it was.

    The event row and the notice are in the same transaction. The object is brought up to date.
    With ``seen`` that event must still be the last. ``driver`` takes it on from there, if any.
    """
    fields["driver"] = driver
    with transaction.atomic():
        rows = Sandbox.objects.select_for_update().filter(pk=sandbox.pk, status__in=among)
        before = rows.values_list("status", flat=True).first()
        if before is None or (seen is not None and last_event(sandbox) != seen):
            return False
        Sandbox.objects.filter(pk=sandbox.pk).update(status=to, **fields)
        SandboxEvent.objects.create(
            sandbox=sandbox, kind=kind, from_status=before, to_status=to, data=data or {}
        )
        tell_changed(sandbox.pk, sandbox.team_id)
    for name, value in {"status": to, **fields}.items():
        setattr(sandbox, name, value)
    return True


def last_event(sandbox: Sandbox) -> int:
    """The number of what happened to it last; 0 for nothing."""
    events = SandboxEvent.objects.filter(sandbox=sandbox).order_by("-id")
    return events.values_list("pk", flat=True).first() or 0


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


def pausing(sandbox: Sandbox, driver: str) -> bool:
    """It is about to stand still."""
    among, to = [SandboxStatus.RUNNING], SandboxStatus.PAUSING
    return change(sandbox, "pausing", among=among, to=to, driver=driver)


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


def resuming(sandbox: Sandbox, driver: str) -> bool:
    """It is about to run on."""
    among, to = [SandboxStatus.PAUSED], SandboxStatus.RESUMING
    return change(sandbox, "resuming", among=among, to=to, driver=driver)


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


def ended(sandbox: Sandbox, kind: str, driver: str = "") -> bool:
    """It ended as it should: ``terminated`` by somebody, or ``expired``.

    ``driver`` is to free what the host has of it.
    """
    now, to = timezone.now(), SandboxStatus.TERMINATED
    return change(sandbox, kind, among=LIVE, to=to, driver=driver, ended_at=now)


def released(sandbox_ids: Iterable[str], driver: str) -> bool:
    """What the host had of these, which have ended, is freed or about to be; whether it was news.

    Not of those that another driver is at.
    """
    rows = Sandbox.objects.filter(pk__in=sandbox_ids, driver=driver).exclude(status__in=LIVE)
    return rows.update(driver="") > 0


def as_on_host(sandbox: Sandbox, info: SandboxInfo, seen: int) -> bool:
    """It runs or stands still as the host says, unless something happened to it since ``seen``."""
    end = datetime.fromtimestamp(info.deadline, UTC) if info.deadline else sandbox.expires_at
    # A new stretch of running is one that follows on standing still.
    anew = sandbox.status != SandboxStatus.PAUSING and not info.paused
    times: dict[str, Any] = {"started_at": timezone.now()} if anew else {}
    return change(
        sandbox,
        "paused" if info.paused else "resumed" if anew else "pause_failed",
        among=[sandbox.status],
        to=SandboxStatus.PAUSED if info.paused else SandboxStatus.RUNNING,
        data={"until" if info.paused else "expires_at": end.isoformat()},
        seen=seen,
        expires_at=end,
        **times,
    )


def broken(sandbox: Sandbox, message: str, among: Iterable[str] = LIVE, driver: str = "") -> bool:
    """It ended as it should not; ``driver`` is to free what the host has of it."""
    return settle(
        sandbox,
        "failed",
        among=among,
        to=SandboxStatus.FAILED,
        data={"reason": message},
        driver=driver,
        ended_at=timezone.now(),
        error_message=message,
    )


def gone(sandbox: Sandbox, info: SandboxInfo | None) -> bool:
    """Settle a sandbox whose container is no more, by what the host knows of it."""
    end = end_of(info)
    if end.to == SandboxStatus.TERMINATED:
        return ended(sandbox, end.kind)
    return broken(sandbox, end.message)


def end_of(info: SandboxInfo | None) -> End:
    """How a sandbox ended of which the host knows this."""
    if info is not None and info.reason == "expired":
        return End("expired", SandboxStatus.TERMINATED)
    reasons = {"exited": EXITED, "out_of_disk": OUT_OF_DISK}
    message = reasons.get(info.reason or "", LOST) if info is not None else LOST
    return End("failed", SandboxStatus.FAILED, message)


def all_ended(found: Mapping[str, End], among: Iterable[str] = LIVE) -> list[str]:
    """The same for many, by a few statements however many there are; which of them it was so of.

    Those are in one of ``among``. Events and notices are in the same transaction.
    """
    now = timezone.now()
    with transaction.atomic():
        rows = Sandbox.objects.select_for_update().filter(pk__in=found, status__in=among)
        held = list(rows.order_by("pk").only("pk", "team_id", "status"))
        alike: dict[End, list[Sandbox]] = defaultdict(list)
        for sandbox in held:
            alike[found[sandbox.pk]].append(sandbox)
        for end, sandboxes in alike.items():
            Sandbox.objects.filter(pk__in=[one.pk for one in sandboxes]).update(
                status=end.to, ended_at=now, error_message=end.message, driver=""
            )
        SandboxEvent.objects.bulk_create(
            [end_event(one, end) for end, sandboxes in alike.items() for one in sandboxes]
        )
        tell_all_changed([(one.pk, one.team_id) for one in held])
    return [one.pk for one in held]


def end_event(sandbox: Sandbox, end: End) -> SandboxEvent:
    """What is written down of an end."""
    data = {"reason": end.message} if end.message else {}
    return SandboxEvent(
        sandbox=sandbox, kind=end.kind, from_status=sandbox.status, to_status=end.to, data=data
    )
