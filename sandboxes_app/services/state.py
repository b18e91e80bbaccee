"""The only place where a sandbox's status changes: compare-and-set with an event and a notice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import Any

from django.db import connection, transaction
from django.utils import timezone

from hostruntime.wire.sandboxes import SandboxInfo
from orkestr_console.accounts.models import AuditEntry
from orkestr_console.core.channel_layer import NOTIFY_SQL
from orkestr_console.core.postgres import persistently
from orkestr_console.core.rows import Computed, insert_values, insertion_sql, quoted
from orkestr_console.webhooks import outbox
from sandboxes_app.events import change_payloads, notify_many_changed
from sandboxes_app.models import LIVE, Sandbox, SandboxEvent, SandboxStatus
from sandboxes_app.services.announcing import announce, announcement

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
# What webhooks are told of a change, besides what does not change.
ANNOUNCED = ("expires_at", "error_message")


# A new row, and what is written with it.
ADDITION_SQL = "WITH made AS ({made}), event AS ({event}), entry AS ({entry}) {notify}"
# What the other two have of the row: psycopg parses a statement anew each time that has more than
# fifty parameters (psycopg._queries).
OF_THE_ROW: dict[str, Computed] = {
    "event": (("sandbox_id", "%(made_id)s"), ("to_status", "%(made_status)s")),
    "entry": (("team_id", "%(made_team_id)s"), ("object_id", "%(made_id)s")),
}
# Locks the row in its old state, from which everything else follows. A statement is atomic, and an
# UPDATE that had to wait for another one tests the row's new version ("Read Committed Isolation
# Level" in the PostgreSQL manual).
CHANGE_SQL = """
WITH before AS (
    SELECT id, status FROM {table} WHERE id = %(id)s AND status = ANY(%(from_statuses)s) FOR UPDATE
), changed AS (
    UPDATE {table} now SET {assignments} FROM before WHERE now.id = before.id
), event AS ({event}){entry}{told}
SELECT sent.*, ({count}) FROM ({notify}, before) AS sent
"""
# The webhooks' deliveries, as a part of it.
TOLD_SQL = outbox.put_sql("before", "before.status = ANY(%(told_from)s)")


@dataclass(frozen=True)
class End:
    """How a sandbox ended: the event, the status, and the error message of a failure."""

    kind: str
    to: SandboxStatus
    message: str = ""


def transition(
    sandbox: Sandbox,
    kind: str,
    *,
    from_statuses: Iterable[str],
    to: SandboxStatus,
    data: dict[str, Any] | None = None,
    driver: str = "",
    entry: AuditEntry | None = None,
    **fields: Any,
) -> bool:
    """Move ``sandbox`` to ``to`` if it is in one of ``from_statuses``; whether it was.

    One statement writes the row, its event, the ``entry`` of the audit log if there is one, the
    deliveries to webhooks, and the notice. The object is updated too. ``driver`` is the new one.
    """
    from_statuses = list(from_statuses)
    changed = {name: fields[name] for name in ANNOUNCED if name in fields}
    told = announcement(sandbox, kind, from_statuses, to, **changed)
    fields |= {"status": to, "driver": driver}
    event = SandboxEvent(sandbox=sandbox, kind=kind, to_status=to, data=data or {})
    with connection.cursor() as cursor:
        cursor.execute(
            change_sql(tuple(fields), audited=entry is not None, told=bool(told)),
            {
                "id": sandbox.pk,
                "from_statuses": from_statuses,
                **told,
                **{f"new_{name}": value for name, value in fields.items()},
                **insert_values(event, "event_"),
                **(insert_values(entry, "entry_") if entry else {}),
                "notices": change_payloads(sandbox.pk, sandbox.team_id),
            },
        )
        if (row := cursor.fetchone()) is None:
            return False
    after_change(sandbox, fields, told=row[1] > 0)
    return True


def after_change(sandbox: Sandbox, fields: Mapping[str, Any], *, told: bool) -> None:
    """Update the object, and have what webhooks are told be sent."""
    for name, value in fields.items():
        setattr(sandbox, name, value)
    if told:
        # If this process is killed before, the listener finds them.
        outbox.wake_worker()


@cache
def change_sql(names: tuple[str, ...], *, audited: bool, told: bool) -> str:
    """The statement that changes these columns, as :func:`transition` does."""
    entry = insertion_sql(AuditEntry, "entry_", "before")
    return CHANGE_SQL.format(
        table=quoted(Sandbox._meta.db_table),
        assignments=", ".join(f"{quoted(name)} = %(new_{name})s" for name in names),
        event=insertion_sql(SandboxEvent, "event_", "before", (("from_status", "before.status"),)),
        entry=f", entry AS ({entry})" if audited else "",
        told=f", told AS ({TOLD_SQL})" if told else "",
        count="SELECT count(*) FROM told" if told else "0",
        notify=NOTIFY_SQL,
    )


def add(sandbox: Sandbox, entry: AuditEntry) -> None:
    """Insert a new row, with its first event, an entry of the audit log, and the notice."""
    event = SandboxEvent(sandbox=sandbox, kind="created", to_status=sandbox.status)
    with connection.cursor() as cursor:
        cursor.execute(
            addition_sql(),
            {
                **insert_values(sandbox, "made_"),
                **insert_values(event, "event_", dict(OF_THE_ROW["event"])),
                **insert_values(entry, "entry_", dict(OF_THE_ROW["entry"])),
                "notices": change_payloads(sandbox.pk, sandbox.team_id),
            },
        )
    sandbox._state.adding = False


@cache
def addition_sql() -> str:
    """The statement of :func:`add`."""
    parts = {"made": Sandbox, "event": SandboxEvent, "entry": AuditEntry}
    written = {
        name: insertion_sql(model, f"{name}_", computed=OF_THE_ROW.get(name, ()))
        for name, model in parts.items()
    }
    return ADDITION_SQL.format(**written, notify=NOTIFY_SQL)


def transition_if_last(sandbox: Sandbox, last_seen_event: int, kind: str, **changes: Any) -> bool:
    """The same as :func:`transition` if that event is still the last; whether both were so."""
    with transaction.atomic():
        # Nobody can add an event without the row's lock.
        Sandbox.objects.select_for_update().filter(pk=sandbox.pk).first()
        return last_event(sandbox) == last_seen_event and transition(sandbox, kind, **changes)


def last_event(sandbox: Sandbox) -> int:
    """The id of its last event; 0 if there is none."""
    events = SandboxEvent.objects.filter(sandbox=sandbox).order_by("-id")
    return events.values_list("pk", flat=True).first() or 0


def transition_persistently(
    sandbox: Sandbox, kind: str, *, to: SandboxStatus, **changes: Any
) -> bool:
    """The same for a change that the host has already made, however long the database is away.

    A retry after a lost answer finds the row already changed, which counts as success.
    """
    tries = 0

    def once() -> bool:
        nonlocal tries
        tries += 1
        if transition(sandbox, kind, to=to, **changes):
            return True
        return tries > 1 and Sandbox.objects.filter(pk=sandbox.pk, status=to).exists()

    return persistently(once)


def mark_running(sandbox: Sandbox, info: SandboxInfo) -> bool:
    """It is running."""
    return transition_persistently(
        sandbox,
        "running",
        from_statuses=[SandboxStatus.STARTING],
        to=SandboxStatus.RUNNING,
        started_at=timezone.now(),
        boot_ms=info.boot_ms,
    )


def mark_extended(sandbox: Sandbox, expires_at: datetime) -> bool:
    """It keeps running, until a new deadline."""
    return transition_persistently(
        sandbox,
        "timeout_set",
        from_statuses=[SandboxStatus.RUNNING],
        to=SandboxStatus.RUNNING,
        data={"expires_at": expires_at.isoformat()},
        expires_at=expires_at,
    )


def mark_pausing(sandbox: Sandbox, driver: str) -> bool:
    """It is about to be paused."""
    from_statuses, to = [SandboxStatus.RUNNING], SandboxStatus.PAUSING
    return transition(sandbox, "pausing", from_statuses=from_statuses, to=to, driver=driver)


def mark_pause_failed(sandbox: Sandbox) -> bool:
    """It could not be paused, and keeps running."""
    return transition_persistently(
        sandbox, "pause_failed", from_statuses=[SandboxStatus.PAUSING], to=SandboxStatus.RUNNING
    )


def mark_paused(sandbox: Sandbox, until: datetime) -> bool:
    """It is paused, and ends at ``until`` unless it is resumed."""
    from_statuses = [SandboxStatus.PAUSING, SandboxStatus.RESUMING]
    return transition_persistently(
        sandbox,
        "paused",
        from_statuses=from_statuses,
        to=SandboxStatus.PAUSED,
        data={"until": until.isoformat()},
        expires_at=until,
    )


def mark_resuming(sandbox: Sandbox, driver: str) -> bool:
    """It is about to be resumed."""
    from_statuses, to = [SandboxStatus.PAUSED], SandboxStatus.RESUMING
    return transition(sandbox, "resuming", from_statuses=from_statuses, to=to, driver=driver)


def mark_resume_failed(sandbox: Sandbox) -> bool:
    """It could not be resumed."""
    return transition_persistently(
        sandbox, "resume_failed", from_statuses=[SandboxStatus.RESUMING], to=SandboxStatus.PAUSED
    )


def mark_resumed(sandbox: Sandbox, expires_at: datetime) -> bool:
    """It is running again, until a new deadline."""
    from_statuses = [SandboxStatus.PAUSING, SandboxStatus.RESUMING]
    return transition_persistently(
        sandbox,
        "resumed",
        from_statuses=from_statuses,
        to=SandboxStatus.RUNNING,
        data={"expires_at": expires_at.isoformat()},
        started_at=timezone.now(),
        expires_at=expires_at,
    )


def mark_ended(
    sandbox: Sandbox, kind: str, driver: str = "", entry: AuditEntry | None = None
) -> bool:
    """It ended normally: ``terminated`` by somebody, which is the ``entry``, or ``expired``.

    ``driver`` releases what the host has of it.
    """
    return transition(
        sandbox,
        kind,
        from_statuses=LIVE,
        to=SandboxStatus.TERMINATED,
        driver=driver,
        entry=entry,
        ended_at=timezone.now(),
    )


def mark_released(sandbox_ids: Iterable[str], driver: str) -> bool:
    """Clear ``driver`` from ended sandboxes, as their release is done or queued.

    Whether any had it: those with another driver stay as they are.
    """
    rows = Sandbox.objects.filter(pk__in=sandbox_ids, driver=driver).exclude(status__in=LIVE)
    return rows.update(driver="") > 0


def match_host(sandbox: Sandbox, info: SandboxInfo, last_seen_event: int) -> bool:
    """Match the host, running or paused, unless the row has a newer event than the one seen."""
    end = datetime.fromtimestamp(info.deadline, UTC) if info.deadline else sandbox.expires_at
    # Running counts anew after a pause.
    restarted = sandbox.status != SandboxStatus.PAUSING and not info.paused
    times: dict[str, Any] = {"started_at": timezone.now()} if restarted else {}
    return transition_if_last(
        sandbox,
        last_seen_event,
        "paused" if info.paused else "resumed" if restarted else "pause_failed",
        from_statuses=[sandbox.status],
        to=SandboxStatus.PAUSED if info.paused else SandboxStatus.RUNNING,
        data={"until" if info.paused else "expires_at": end.isoformat()},
        expires_at=end,
        **times,
    )


def mark_failed(
    sandbox: Sandbox, message: str, from_statuses: Iterable[str] = LIVE, driver: str = ""
) -> bool:
    """It ended abnormally; ``driver`` releases what the host has of it."""
    return transition_persistently(
        sandbox,
        "failed",
        from_statuses=from_statuses,
        to=SandboxStatus.FAILED,
        data={"reason": message},
        driver=driver,
        ended_at=timezone.now(),
        error_message=message,
    )


def mark_missing(sandbox: Sandbox, info: SandboxInfo | None) -> bool:
    """Settle a sandbox whose container is gone, by what the host knows of it."""
    end = end_reason(info)
    if end.to == SandboxStatus.TERMINATED:
        return mark_ended(sandbox, end.kind)
    return mark_failed(sandbox, end.message)


def end_reason(info: SandboxInfo | None) -> End:
    """How a sandbox ended, by what the host knows of it."""
    if info is not None and info.reason == "expired":
        return End("expired", SandboxStatus.TERMINATED)
    reasons = {"exited": EXITED, "out_of_disk": OUT_OF_DISK}
    message = reasons.get(info.reason or "", LOST) if info is not None else LOST
    return End("failed", SandboxStatus.FAILED, message)


def mark_many_ended(ends: Mapping[str, End], from_statuses: Iterable[str] = LIVE) -> list[str]:
    """The same for many, with few statements however many there are; the ids that changed.

    Only those in one of ``from_statuses`` do. Events and notices are in the same transaction.
    """
    now = timezone.now()
    with transaction.atomic():
        rows = Sandbox.objects.select_for_update().filter(pk__in=ends, status__in=from_statuses)
        rows = rows.annotate(watched=outbox.has_webhooks()).order_by("pk")
        locked: list[Any] = list(
            rows.only("team_id", "status", "template", "metadata", "expires_at")
        )
        by_end: dict[End, list[Sandbox]] = defaultdict(list)
        for sandbox in locked:
            by_end[ends[sandbox.pk]].append(sandbox)
        for end, sandboxes in by_end.items():
            Sandbox.objects.filter(pk__in=[sandbox.pk for sandbox in sandboxes]).update(
                status=end.to, ended_at=now, error_message=end.message, driver=""
            )
        SandboxEvent.objects.bulk_create(
            [end_event(sandbox, end) for end, sandboxes in by_end.items() for sandbox in sandboxes]
        )
        for sandbox in locked:
            if sandbox.watched:
                end = ends[sandbox.pk]
                before, message = sandbox.status, end.message
                announce(sandbox, end.kind, before, end.to, error_message=message)
        notify_many_changed([(sandbox.pk, sandbox.team_id) for sandbox in locked])
    return [sandbox.pk for sandbox in locked]


def end_event(sandbox: Sandbox, end: End) -> SandboxEvent:
    """The event that records an end."""
    data = {"reason": end.message} if end.message else {}
    return SandboxEvent(
        sandbox=sandbox, kind=end.kind, from_status=sandbox.status, to_status=end.to, data=data
    )
