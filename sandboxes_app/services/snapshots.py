"""Snapshots of running sandboxes: creating, reading and deleting them, and starting from one."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from django.db import transaction
from django.db.models import Count, Q, Sum
from django.db.models.functions import Coalesce
from django.utils import timezone

from hostruntime import errors as host_errors
from hostruntime.client.host_client import HostClient
from hostruntime.wire.sandboxes import SnapshotInfo
from orkestr_console.accounts import audit
from orkestr_console.accounts.actor import READ, WRITE, Actor
from orkestr_console.accounts.audit import audited
from orkestr_console.accounts.limits import held_in_turn, settling, wait_for_turn
from orkestr_console.accounts.models import Team
from orkestr_console.core.errors import (
    Conflict,
    DomainError,
    HostUnavailable,
    InvalidInput,
    NotFound,
    PlanLimit,
)
from orkestr_console.core.hosts import Steps, ask, host, in_steps, translate_error
from orkestr_console.core.ids import is_id
from orkestr_console.core.postgres import persistently
from orkestr_console.http.paging import page
from orkestr_console.installation import services as installation
from orkestr_console.queue.driving import driving
from sandboxes_app.models import Sandbox, Snapshot, SnapshotStatus
from sandboxes_app.services.lifecycle import find_running, settle_if_missing
from sandboxes_app.specs import SandboxSpec, SnapshotSpec

logger = logging.getLogger(__name__)

NOT_FOUND = "There is no such snapshot in your team; check the id."
LOST = "The host lost the files of this snapshot; take another one."
CUT_OFF = "The server was stopped while the snapshot was taken; take another one."
MEGABYTE = 1_000_000


@in_steps
@audited("snapshot.create", "sandbox")
def create_snapshot(actor: Actor, sandbox_id: str, spec: SnapshotSpec) -> Steps[Snapshot]:
    """Capture the files of a running sandbox, for others to start from; it keeps running.

    Raises ``NotFound``, ``Conflict`` (not running, ``snapshot_cap_reached``, another capture is
    running), ``FleetFull``, ``HostUnavailable``; the row then records the failure.
    """
    actor.require(WRITE)
    sandbox = yield from find_running.steps(actor, sandbox_id)
    with driving() as driver:
        snapshot = yield from insert_row(actor, sandbox, spec, driver)
        yield from capture(snapshot, sandbox)
    return snapshot


def capture(snapshot: Snapshot, sandbox: Sandbox) -> Steps[None]:
    """Have the host copy the files. A failure leaves only the row; raises the domain error."""
    try:
        info = yield from ask(HostClient.create_snapshot, snapshot.pk, sandbox.pk)
    except host_errors.HostError as error:
        raise (yield from discard(snapshot, sandbox, error)) from error
    try:
        is_ready = mark_ready(snapshot, info)
    except Conflict:
        yield from release.steps(snapshot.pk)
        raise
    if not is_ready:
        yield from release.steps(snapshot.pk)
        raise Conflict("The snapshot was deleted while it was taken.", code="snapshot_not_ready")


def insert_row(actor: Actor, sandbox: Sandbox, spec: SnapshotSpec, driver: str) -> Steps[Snapshot]:
    """Insert the row, counted against the plan under the team's lock; ``driver`` captures it."""
    yield from wait_for_turn(actor.team)
    with held_in_turn(actor.team, actor.user) as limits:
        try:
            for name, used in usage_counts([limits.team])[limits.team.pk].items():
                limits.require_room(name, used)
        except PlanLimit as error:
            raise cap_reached(error) from None
        snapshot = Snapshot.objects.create(
            team=limits.team,
            created_by=actor.user,
            name=spec.name or "",
            driver=driver,
            template=sandbox.template,
            template_name=sandbox.template_name,
            image_id=sandbox.image_id,
            size=sandbox.size,
            cpu=sandbox.cpu,
            memory_mb=sandbox.memory_mb,
            network=sandbox.network,
            allow_domains=sandbox.allow_domains,
            source_sandbox_id=sandbox.pk,
            region=sandbox.region,
            node_id=sandbox.node_id,
        )
        audit.record(
            actor,
            "snapshot.create",
            kind="snapshot",
            object_id=snapshot.pk,
            name=snapshot.name or snapshot.template_name,
            data={"sandbox": sandbox.pk, "template": sandbox.template},
        )
    return snapshot


def cap_reached(error: PlanLimit) -> Conflict:
    """A plan's limit in the contract's words for snapshots."""
    return Conflict(error.detail, code="snapshot_cap_reached", extra=error.extra)


def usage_counts(teams: Collection[Team]) -> dict[str, dict[str, int]]:
    """Each team's usage of the limits on snapshots: how many are stored, and their megabytes."""
    rows = (
        Snapshot.objects.stored()
        .filter(team__in=teams)
        .values("team")
        .annotate(kept=Count("pk"), size=Coalesce(Sum("size_mb"), 0))
    )
    used = {
        row["team"]: {"max_named_snapshots": row["kept"], "snapshot_disk_mb": row["size"]}
        for row in rows
    }
    zero = {"max_named_snapshots": 0, "snapshot_disk_mb": 0}
    return {team.pk: used.get(team.pk, zero) for team in teams}


def mark_ready(snapshot: Snapshot, info: SnapshotInfo) -> bool:
    """Mark it as ready, unless it was deleted or abandoned meanwhile; whether it is ready.

    Raises ``Conflict`` (``snapshot_cap_reached``) if others that were taken at the same time have
    used the team's disk space; it has failed then.
    """
    size_mb = -(-info.size_bytes // MEGABYTE)
    refused = persistently(lambda: settle_captured(snapshot, size_mb))
    if refused is not None:
        raise refused
    # A deletion or failure meanwhile shows in the status or ``deleted_at``.
    return snapshot.status == SnapshotStatus.READY and snapshot.deleted_at is None


def settle_captured(snapshot: Snapshot, size_mb: int) -> Conflict | None:
    """Make a captured one ready, or failed if the team has no disk space left; returns why.

    Its size is known only now. So the limit counts as if it had been asked for now: as always, it
    may be exceeded by one snapshot, but not by all that were asked for at the same time.
    """
    rows = Snapshot.objects.filter(pk=snapshot.pk, status=SnapshotStatus.CAPTURING, deleted_at=None)
    with settling(snapshot.team, "snapshot_disk_mb") as limits:
        used = usage_counts([limits.team])[limits.team.pk]["snapshot_disk_mb"]
        refused: Conflict | None = None
        settled = {"status": SnapshotStatus.READY, "size_mb": size_mb, "ready_at": timezone.now()}
        try:
            limits.require_room("snapshot_disk_mb", used)
        except PlanLimit as error:
            refused, settled = cap_reached(error), failure(error.detail)
        if not rows.update(**settled):
            # Deleted or settled before; or it is repeated, as the answer to its commit was lost.
            snapshot.refresh_from_db()
            return None
    for name, value in settled.items():
        setattr(snapshot, name, value)
    return refused


def mark_failed(snapshot: Snapshot, message: str) -> None:
    """Mark it as failed or lost."""
    rows = Snapshot.objects.filter(pk=snapshot.pk)
    persistently(lambda: rows.update(**failure(message)))


def failure(message: str) -> dict[str, Any]:
    """The columns of one that failed."""
    return {"status": SnapshotStatus.FAILED, "error_message": message}


def settle_orphans(snapshot_ids: Collection[str]) -> None:
    """Settle snapshots without a driver by what the host has. Raises the host's errors.

    One whose copy is complete is ready; the others, and those deleted meanwhile, are released.
    """
    rows = list(Snapshot.objects.filter(pk__in=snapshot_ids, status=SnapshotStatus.CAPTURING))
    if not rows:
        return
    present = {info.id: info for info in host().snapshots()}
    for snapshot in rows:
        if snapshot.pk in present and snapshot.deleted_at is None:
            try:
                mark_ready(snapshot, present[snapshot.pk])
            except Conflict:
                release(snapshot.pk)
            continue
        capturing = Snapshot.objects.filter(pk=snapshot.pk, status=SnapshotStatus.CAPTURING)
        if capturing.update(status=SnapshotStatus.FAILED, error_message=CUT_OFF):
            release(snapshot.pk)


def discard(
    snapshot: Snapshot, sandbox: Sandbox, error: host_errors.HostError
) -> Steps[DomainError]:
    """Discard a failed capture, so that only the row is left; the domain error to raise."""
    try:
        if (yield from settle_if_missing.steps(sandbox)):
            error = host_errors.ContainerGone(error.detail)
    except HostUnavailable:
        logger.warning("could not check sandbox %s: the host does not answer", sandbox.pk)
    if isinstance(error, host_errors.NotFound):
        error = host_errors.ContainerGone(error.detail)
    domain = translate_error(error)
    mark_failed(snapshot, domain.detail)
    yield from release.steps(snapshot.pk)
    return domain


def find(actor: Actor, snapshot_id: str) -> Snapshot:
    """The row. Raises ``NotFound``."""
    if is_id("snap", snapshot_id):
        found = Snapshot.objects.for_team(actor.team).filter(pk=snapshot_id).first()
        if found is not None:
            return found
    raise NotFound(NOT_FOUND)


def get_snapshot(actor: Actor, snapshot_id: str) -> Snapshot:
    """One of the team's snapshots. Raises ``NotFound``."""
    actor.require(READ)
    return find(actor, snapshot_id)


def list_snapshots(
    actor: Actor,
    *,
    failed: bool | None = None,
    limit: int | None = None,
    cursor: str | None = None,
) -> tuple[list[Snapshot], str | None]:
    """The team's snapshots, newest first, and the cursor of the next page or None.

    Only those that ``failed``, or only the others.
    """
    actor.require(READ)
    rows = Snapshot.objects.for_team(actor.team)
    if failed is not None:
        broken = {"status": SnapshotStatus.FAILED}
        rows = rows.filter(**broken) if failed else rows.exclude(**broken)
    return page(rows, limit, cursor)


@in_steps
@audited("snapshot.delete", "snapshot")
def delete_snapshot(actor: Actor, snapshot_id: str) -> Steps[None]:
    """Delete a snapshot; deleting it again is no error. Sandboxes started from it keep running.

    Raises ``NotFound``.
    """
    actor.require(WRITE)
    rows = Snapshot.objects.filter(team=actor.team, pk=snapshot_id)
    snapshot = rows.first() if is_id("snap", snapshot_id) else None
    if snapshot is None:
        raise NotFound(NOT_FOUND)
    with transaction.atomic():
        deleted = rows.filter(deleted_at=None).update(deleted_at=timezone.now())
        if deleted:
            name = snapshot.name or snapshot.template_name
            audit.record(
                actor, "snapshot.delete", kind="snapshot", object_id=snapshot.pk, name=name
            )
    if deleted:
        yield from release.steps(snapshot.pk)


@in_steps
def release(snapshot_id: str) -> Steps[None]:
    """Delete it on the host now, or leave that to the reconcile pass."""
    try:
        yield from ask(HostClient.delete_snapshot, snapshot_id)
    except host_errors.HostError as error:
        logger.warning("could not delete snapshot %s yet: %s", snapshot_id, error.detail)


# Starting from one ----------------------------------------------------------------------------


def apply_snapshot(actor: Actor, spec: SandboxSpec) -> tuple[SandboxSpec, Snapshot]:
    """The request completed with what the snapshot determines, and the snapshot.

    Raises ``NotFound``, ``Conflict`` (it is not ready).
    """
    snapshot = find(actor, spec.snapshot or "")
    if snapshot.status != SnapshotStatus.READY:
        raise Conflict(
            f"The snapshot is {snapshot.status}, not ready; wait for it, or use another one.",
            code="snapshot_not_ready",
        )
    inherited: dict[str, Any] = {"template": snapshot.template, "size": snapshot.size}
    if "network" not in spec.model_fields_set:
        inherited["network"] = snapshot.network
    if spec.allow_domains is None and inherited.get("network", spec.network) == snapshot.network:
        # Never wider than what the snapshot's sandbox could reach, unless the caller asks for it.
        inherited["allow_domains"] = snapshot.allow_domains
    completed = spec.model_copy(update=inherited)
    if spec.allow_domains is not None and completed.network != "restricted":
        sentence = (
            f"applies to network 'restricted' only, and the snapshot's is {snapshot.network!r}."
        )
        raise InvalidInput(f"allow_domains: {sentence}", fields={"allow_domains": sentence})
    return completed, snapshot


def missing_error(snapshot: Snapshot) -> DomainError:
    """The error for a snapshot that the host doesn't have; marks the row as failed."""
    if not installation.is_mismatched():
        mark_failed(snapshot, LOST)
    return Conflict(LOST, code="snapshot_not_ready")


# Every minute -----------------------------------------------------------------------------------


def reconcile() -> None:
    """Make rows and the host's snapshots agree. Raises the host's errors.

    Only for a host whose state belongs to this database. What no row refers to is quarantined, not
    deleted.
    """
    ready = list(Snapshot.objects.stored().filter(status=SnapshotStatus.READY))
    known = host().snapshots()
    present = {info.id for info in known}
    for snapshot in ready:
        if snapshot.pk not in present:
            mark_failed(snapshot, LOST)
    lost = Q(status=SnapshotStatus.FAILED, error_message=LOST, deleted_at=None)
    # An operator has restored it.
    Snapshot.objects.filter(lost, pk__in=present).update(
        status=SnapshotStatus.READY, error_message=""
    )
    for deleted in Snapshot.objects.filter(pk__in=present).exclude(deleted_at=None):
        # The host was unreachable when somebody deleted it.
        release(deleted.pk)
    # A row exists before the host starts, and the host keeps what is young.
    known_ids = list(Snapshot.objects.stored().values_list("pk", flat=True))
    installation.reconcile(snapshots=known_ids)
