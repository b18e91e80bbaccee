"""Creating a sandbox: a row, a container, and the row again."""

from __future__ import annotations

import re
import socket
from collections.abc import Collection, Iterable
from datetime import timedelta
from functools import cache, partial
from typing import Any

from django.conf import settings
from django.db import connection, transaction
from django.db.models import Count
from django.utils import timezone

from hostruntime import errors as host_errors
from hostruntime.client.host_client import HostClient
from hostruntime.wire.sandboxes import CreateSandbox
from orkestr_console.accounts import audit
from orkestr_console.accounts.actor import WRITE, Actor
from orkestr_console.accounts.audit import audited
from orkestr_console.accounts.limits import Envelope, held_in_turn, wait_for_turn
from orkestr_console.accounts.models import AuditEntry, Team
from orkestr_console.core.errors import Conflict
from orkestr_console.core.hosts import Steps, ask, host, in_steps, translate_error
from orkestr_console.core.postgres import persistently
from orkestr_console.core.rows import quoted
from orkestr_console.installation import services as installation
from orkestr_console.queue.driving import driving, sharing
from sandboxes_app.models import (
    LIVE,
    MAX_PAUSE,
    Sandbox,
    SandboxQuerySet,
    SandboxStatus,
    Snapshot,
)
from sandboxes_app.services import snapshots, state, volumes
from sandboxes_app.specs import SIZES, SandboxSpec
from templates_app.models import Template
from templates_app.services import mark_lost, mark_used
from templates_app.services.bases import ALIASES, TEMPLATE_ID_PREFIX, Source, resolve

FAILED_TO_START = (
    "The host couldn't start the sandbox. Try again; if it keeps failing, tell your operator."
)
# A page that shows the count among others doesn't wait for it as long as for its main content.
COUNT_TIMEOUT = 2.0
NODE_ID = socket.gethostname()
# Lower case and short, which the ids of templates and images are not.
COUNT_SQL = """
SELECT count(*), count(*) FILTER (WHERE created_by_id = %(user)s::bigint) FROM {table}
WHERE team_id = %(team)s AND status IN ({using}) AND expires_at > %(now)s
"""
VOLUME_REFUSED = (
    host_errors.VolumeInUse,
    host_errors.VolumeDamaged,
    host_errors.VolumeMissing,
)
BUILT_IN_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,62}", re.ASCII)


@in_steps
@audited("sandbox.create", "sandbox")
def create_sandbox(actor: Actor, spec: SandboxSpec) -> Steps[Sandbox]:
    """Create a sandbox; it is running when this returns.

    Raises ``InvalidInput``, ``NotFound``, ``Conflict`` (a template or snapshot that is not ready),
    ``PlanLimit``, ``FleetFull`` (then nothing was created), ``HostUnavailable``.
    """
    actor.require(WRITE)
    volumes.require_region(spec.region)
    snapshot: Snapshot | None = None
    if spec.snapshot is not None:
        spec, snapshot = snapshots.apply_snapshot(actor, spec)
    actor.require_template(spec.template or "")
    actor.require_network(spec.network)
    if snapshot is None:
        source = yield from resolve_source(actor.team, spec.template or "")
    else:
        source = Source(snapshot.template, snapshot.template_name, snapshot.image_id)
    yield from volumes.settle_wanted(actor, spec.volume)
    # Copying a snapshot takes long.
    with driving() if snapshot else sharing("start") as driver:
        sandbox, claim = yield from insert_row(actor, spec, source, snapshot, driver)
        yield from boot_or_discard(actor, spec, sandbox, snapshot, claim)
    return sandbox


def boot_or_discard(
    actor: Actor,
    spec: SandboxSpec,
    sandbox: Sandbox,
    snapshot: Snapshot | None,
    claim: volumes.Claim | None,
) -> Steps[None]:
    """Boot it; a failure leaves nothing on the host. Raises the domain error."""
    try:
        yield from boot(sandbox, snapshot, claim)
    except VOLUME_REFUSED as error:
        withdraw(sandbox, claim)
        refused = volumes.refused(claim, error) if claim is not None else None
        raise refused or translate_error(error) from error
    except (host_errors.HostFull, host_errors.InvalidRequest) as error:
        # Clients try again, with the same or another request, and rely on nothing being left.
        withdraw(sandbox, claim)
        raise translate_error(error) from error
    except host_errors.NotFound:
        withdraw(sandbox, claim)
        if snapshot:
            raise snapshots.missing_error(snapshot) from None
        raise (yield from image_missing_error(actor.team, spec)) from None
    except host_errors.HostError as error:
        yield from abandon(sandbox)
        raise translate_error(error) from error


def withdraw(sandbox: Sandbox, claim: volumes.Claim | None) -> None:
    """Leave nothing of a sandbox that the host has nothing of, nor of a volume made for it."""
    persistently(partial(remove_rows, sandbox, claim))


def remove_rows(sandbox: Sandbox, claim: volumes.Claim | None) -> None:
    """All of it or, if somebody else has a part of it, after them."""
    rows = Sandbox.objects.filter(pk=sandbox.pk)
    with transaction.atomic():
        if claim is not None and claim.made:
            # With the team's lock, others find the volume: not one whose sandbox is just gone.
            Team.objects.select_for_update().filter(pk=sandbox.team_id).first()
        # With its own, who ends it adds an event (:func:`state.transition`).
        rows.select_for_update().first()
        rows.delete()
        volumes.give_up(claim)


def resolve_source(team: Team, name: str) -> Steps[Source]:
    """What to boot. A built-in name is passed on unchecked: the host knows it, which saves a call.

    An image's id is not such a name: the host would boot it whichever team it belongs to.
    """
    if not BUILT_IN_NAME.fullmatch(name):
        return (yield from resolve.steps(team, name, field="template"))
    image = ALIASES.get(name, name)
    return Source(name, image, image)


def image_missing_error(team: Team, spec: SandboxSpec) -> Steps[Exception]:
    """The error for an image that the host doesn't have."""
    name = spec.template or ""
    try:
        yield from resolve.steps(team, name, field="template")
    except Exception as error:  # noqa: BLE001 - whatever it finds wrong is the answer
        return error
    template = Template.objects.for_team(team).filter(pk=name).first()
    if template is not None and not installation.is_mismatched():
        mark_lost(template)
    return Conflict(
        "The image of this template is gone from the host; rebuild the template.",
        code="template_not_ready",
    )


def insert_row(
    actor: Actor, spec: SandboxSpec, source: Source, snapshot: Snapshot | None, driver: str
) -> Steps[tuple[Sandbox, volumes.Claim | None]]:
    """Insert the row, counted against the plan under the team's lock; ``driver`` starts it."""
    yield from wait_for_turn(actor.team)
    with held_in_turn(actor.team, actor.user) as limits:
        check_limits(actor, limits, spec)
        team, claim = limits.team, volumes.claim(actor, limits, spec.volume)
        sandbox = Sandbox(
            team=team,
            created_by=actor.user,
            driver=driver,
            volume=claim.volume if claim is not None else None,
            volume_name=claim.volume.name if claim is not None else "",
            **columns(spec, source, snapshot),
        )
        state.add(sandbox, creation_entry(actor, sandbox, snapshot))
        if source.id.startswith(TEMPLATE_ID_PREFIX):
            mark_used(source.id)
    return sandbox, claim


def creation_entry(actor: Actor, sandbox: Sandbox, snapshot: Snapshot | None) -> AuditEntry:
    """The entry of the audit log."""
    return audit.entry(
        actor,
        "sandbox.create",
        kind="sandbox",
        object_id=sandbox.pk,
        name=sandbox.template_name,
        data={
            "template": sandbox.template,
            "size": sandbox.size,
            "network": sandbox.network,
            **({"snapshot": snapshot.pk} if snapshot else {}),
            **({"volume": sandbox.volume_name} if sandbox.volume_name else {}),
        },
    )


def columns(spec: SandboxSpec, source: Source, snapshot: Snapshot | None) -> dict[str, Any]:
    """The request as columns of the row."""
    cpu, memory_mb = (snapshot.cpu, snapshot.memory_mb) if snapshot else SIZES[spec.size]
    now = timezone.now()
    return {
        "template": spec.template or "",
        "template_name": source.name[:100],
        "image_id": source.image_id,
        "network": spec.network,
        "allow_domains": spec.allow_domains if spec.network == "restricted" else None,
        "size": spec.size,
        "cpu": cpu,
        "memory_mb": memory_mb,
        "env": spec.env,
        "metadata": spec.metadata,
        "timeout_seconds": spec.timeout_seconds,
        "on_timeout": spec.on_timeout,
        "auto_resume": spec.auto_resume,
        "preview_auth": spec.preview_auth,
        "region": settings.REGION,
        "node_id": NODE_ID,
        "created_at": now,
        "expires_at": now + timedelta(seconds=spec.timeout_seconds),
    }


def check_limits(actor: Actor, limits: Envelope, spec: SandboxSpec) -> None:
    """Raise ``PlanLimit`` unless the team, whose row the caller has locked, may have it."""
    limits.require_size(spec.size)
    limits.require_at_most("max_timeout_seconds", spec.timeout_seconds, "timeout_seconds")
    limits.require_network(spec.network)
    if spec.network == "restricted" and spec.allow_domains is not None:
        limits.require_allowlist()
    name = spec.template or ""
    if BUILT_IN_NAME.fullmatch(name):
        limits.require_base(ALIASES.get(name, name))
    require_slot(actor, limits)


def require_slot(actor: Actor, limits: Envelope) -> None:
    """Raise ``PlanLimit`` unless the team, whose row the caller has locked, has a running slot."""
    user = actor.user.pk if actor.user else None
    with connection.cursor() as cursor:
        cursor.execute(count_sql(), {"team": limits.team.pk, "user": user, "now": timezone.now()})
        used, mine = cursor.fetchone()
    limits.require_room("max_concurrent_sandboxes", used, None if user is None else mine)


@cache
def count_sql() -> str:
    """The statement that counts what uses a running slot: :func:`using_slots` of one team."""
    using = ", ".join(f"'{status}'" for status in LIVE if status != SandboxStatus.PAUSED)
    return COUNT_SQL.format(table=quoted(Sandbox._meta.db_table), using=using)


def using_slots(teams: Iterable[Team]) -> SandboxQuerySet:
    """The sandboxes that use a running slot of the teams; paused ones use other slots."""
    rows = Sandbox.objects.live().filter(team__in=teams)
    return rows.filter(expires_at__gt=timezone.now()).exclude(status=SandboxStatus.PAUSED)


def usage_counts(teams: Collection[Team]) -> dict[str, dict[str, int]]:
    """Each team's usage of the limits on sandboxes, by team id and limit."""
    running = count_by_team(using_slots(teams))
    paused = count_by_team(Sandbox.objects.filter(team__in=teams, status=SandboxStatus.PAUSED))
    snapshot_counts = snapshots.usage_counts(teams)
    volume_counts = volumes.usage_counts(teams)
    commands = running_commands()
    return {
        team.pk: {
            **({} if commands is None else {"max_concurrent_commands": commands.get(team.pk, 0)}),
            "max_concurrent_sandboxes": running.get(team.pk, 0),
            "max_snapshots": paused.get(team.pk, 0),
            **snapshot_counts[team.pk],
            **volume_counts[team.pk],
        }
        for team in teams
    }


def running_commands() -> dict[str, int] | None:
    """Running commands by team id, without zeros; None if the host doesn't answer."""
    try:
        return host().commands(seconds=COUNT_TIMEOUT)
    except host_errors.HostError:
        return None


def count_by_team(rows: SandboxQuerySet) -> dict[str, int]:
    """The number of rows by team id."""
    return {row["team"]: row["many"] for row in rows.values("team").annotate(many=Count("pk"))}


def boot(
    sandbox: Sandbox, snapshot: Snapshot | None = None, claim: volumes.Claim | None = None
) -> Steps[None]:
    """Start the container and update the row. Raises the host's errors."""
    info = yield from ask(
        HostClient.create_sandbox,
        CreateSandbox(
            sandbox.pk,
            image="" if snapshot else sandbox.image_id,
            snapshot=snapshot.pk if snapshot else None,
            cpu=sandbox.cpu,
            memory_mb=sandbox.memory_mb,
            network=sandbox.network,
            allow_domains=sandbox.allow_domains,
            env=sandbox.env,
            deadline=sandbox.expires_at.timestamp(),
            pause_seconds=MAX_PAUSE.total_seconds() if sandbox.pauses_on_timeout else None,
            volume=claim.request() if claim is not None else None,
        ),
    )
    if claim is not None:
        if info.volume != claim.volume.pk:
            # What it wrote to /persist would be gone with it.
            raise host_errors.HostFault("The host agent is too old for volumes.")
        volumes.mark_stored(claim.volume, NODE_ID)
    if not state.mark_running(sandbox, info):
        # Somebody terminated it while it started.
        yield from ask(HostClient.delete_sandbox, sandbox.pk)
        state.mark_released([sandbox.pk], sandbox.driver)
        sandbox.refresh_from_db()


def abandon(sandbox: Sandbox) -> Steps[None]:
    """Settle a sandbox that did not start, and leave nothing of it on the host."""
    driver = sandbox.driver
    state.mark_failed(sandbox, FAILED_TO_START, driver=driver)
    try:
        yield from ask(HostClient.delete_sandbox, sandbox.pk)
    except host_errors.HostError:
        # It keeps its driver, so it is settled as an orphan later.
        return
    state.mark_released([sandbox.pk], driver)
