"""Creating a sandbox: a row, a container, and the row again."""

from __future__ import annotations

import re
import socket
from collections.abc import Collection, Iterable
from datetime import timedelta
from typing import Any

from django.conf import settings
from django.db import transaction
from django.db.models import Count
from django.utils import timezone

from hostruntime import errors as host_errors
from hostruntime.wire.sandboxes import CreateSandbox
from orkestr_console.accounts import audit
from orkestr_console.accounts.actor import WRITE, Actor
from orkestr_console.accounts.audit import audited
from orkestr_console.accounts.limits import Envelope, hold
from orkestr_console.accounts.models import Team
from orkestr_console.core.errors import Conflict, InvalidInput, Unsupported
from orkestr_console.core.hosts import host, told
from orkestr_console.core.postgres import persistently
from orkestr_console.installation import services as installation
from orkestr_console.queue.driving import driving
from sandboxes_app.events import tell_changed
from sandboxes_app.models import Sandbox, SandboxEvent, SandboxQuerySet, SandboxStatus, Snapshot
from sandboxes_app.services import snapshots, state
from sandboxes_app.specs import SIZES, SandboxSpec
from templates_app.models import Template
from templates_app.services import note_lost, note_used
from templates_app.services.bases import ALIASES, LOOKS_LIKE_A_TEMPLATE, Source, resolve

FAILED_TO_START = (
    "The host couldn't start the sandbox. Try again; if it keeps failing, tell your operator."
)
# A page that shows a count among others does not wait for it as long as for what was asked.
COUNTING_SECONDS = 2.0
NODE = socket.gethostname()
# Lower case and short, which the ids of templates and images are not.
BUILT_IN = re.compile(r"[a-z0-9][a-z0-9.-]{0,62}", re.ASCII)


@audited("sandbox.create", "sandbox")
def create_sandbox(actor: Actor, spec: SandboxSpec) -> Sandbox:
    """A new sandbox, running.

    Raises ``InvalidInput``, ``NotFound``, ``Conflict`` (a template or snapshot that is not ready),
    ``PlanLimit``, ``FleetFull`` (nothing was created then), ``HostUnavailable``.
    """
    actor.require(WRITE)
    refuse_unsupported(spec)
    snapshot: Snapshot | None = None
    if spec.snapshot is not None:
        spec, snapshot = snapshots.origin(actor, spec)
    actor.require_template(spec.template or "")
    actor.require_network(spec.network)
    if snapshot is None:
        source = source_of(actor.team, spec.template or "")
    else:
        source = Source(snapshot.template, snapshot.template_name, snapshot.image_id)
    with driving() as driver:
        sandbox = insert(actor, spec, source, snapshot, driver)
        begin(actor, spec, sandbox, snapshot)
    return sandbox


def begin(actor: Actor, spec: SandboxSpec, sandbox: Sandbox, snapshot: Snapshot | None) -> None:
    """Boot it; what fails leaves nothing on the host. Raises the error to tell of that."""
    try:
        boot(sandbox, snapshot)
    except (host_errors.HostFull, host_errors.InvalidRequest) as error:
        # Clients ask again, for the same or for something else, and count on nothing being left.
        persistently(sandbox.delete)
        raise told(error) from error
    except host_errors.NotFound:
        persistently(sandbox.delete)
        raise snapshots.gone(snapshot) if snapshot else no_image(actor.team, spec) from None
    except host_errors.HostError as error:
        abandon(sandbox)
        raise told(error) from error


def refuse_unsupported(spec: SandboxSpec) -> None:
    """Raise ``Unsupported`` for what this release does not do, rather than ignore it."""
    asked = {
        "volume": spec.volume is not None,
        "on_timeout": spec.on_timeout != "kill",
        "auto_resume": spec.auto_resume,
        "preview_auth": spec.preview_auth,
    }
    for field, wanted in asked.items():
        if wanted:
            sentence = "is not supported by this server yet; leave it out."
            raise Unsupported(f"{field}: {sentence}", fields={field: sentence})
    if spec.region not in {None, settings.REGION}:
        sentence = f"is not a region of this server; there is {settings.REGION!r}."
        raise InvalidInput(f"region: {sentence}", fields={"region": sentence})


def source_of(team: Team, name: str) -> Source:
    """What to boot. A built-in name is taken as it is: the host knows best, and saves a call.

    An image's own id is no such name: the host would boot it whosever template it came of.
    """
    if not BUILT_IN.fullmatch(name):
        return resolve(team, name, field="template")
    image = ALIASES.get(name, name)
    return Source(name, image, image)


def no_image(team: Team, spec: SandboxSpec) -> Exception:
    """The error for an image that the host does not have."""
    name = spec.template or ""
    try:
        resolve(team, name, field="template")
    except Exception as error:  # noqa: BLE001 - whatever it finds wrong is the answer
        return error
    template = Template.objects.for_team(team).filter(pk=name).first()
    if template is not None and not installation.is_apart():
        note_lost(template)
    return Conflict(
        "The image of this template is gone from the host; rebuild the template.",
        code="template_not_ready",
    )


def insert(
    actor: Actor, spec: SandboxSpec, source: Source, snapshot: Snapshot | None, driver: str
) -> Sandbox:
    """The row, counted against the plan under the team's lock; ``driver`` is to start it."""
    with transaction.atomic():
        held = hold(actor.team, actor.user)
        check_limits(actor, held, spec)
        team = held.team
        sandbox = Sandbox.objects.create(
            team=team, created_by=actor.user, driver=driver, **columns(spec, source, snapshot)
        )
        SandboxEvent.objects.create(
            sandbox=sandbox, kind="created", to_status=SandboxStatus.STARTING
        )
        if source.id.startswith(LOOKS_LIKE_A_TEMPLATE):
            note_used(source.id)
        tell_changed(sandbox.pk, team.pk)
        audit.record(
            actor,
            "sandbox.create",
            kind="sandbox",
            object_id=sandbox.pk,
            name=sandbox.template_name,
            data={
                "template": sandbox.template,
                "size": spec.size,
                "network": spec.network,
                **({"snapshot": snapshot.pk} if snapshot else {}),
            },
        )
    return sandbox


def columns(spec: SandboxSpec, source: Source, snapshot: Snapshot | None) -> dict[str, Any]:
    """What is asked for, as the row has it."""
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
        "region": settings.REGION,
        "node_id": NODE,
        "created_at": now,
        "expires_at": now + timedelta(seconds=spec.timeout_seconds),
    }


def check_limits(actor: Actor, held: Envelope, spec: SandboxSpec) -> None:
    """Raise ``PlanLimit`` unless the team, whose row the caller holds, may have this one."""
    held.require_size(spec.size)
    held.require_at_most("max_timeout_seconds", spec.timeout_seconds, "timeout_seconds")
    held.require_network(spec.network)
    if spec.network == "restricted" and spec.allow_domains is not None:
        held.require_allowlist()
    name = spec.template or ""
    if BUILT_IN.fullmatch(name):
        held.require_base(ALIASES.get(name, name))
    running = counted([held.team])
    mine = running.filter(created_by=actor.user).count() if actor.user else None
    held.require_room("max_concurrent_sandboxes", running.count(), mine)


def counted(teams: Iterable[Team]) -> SandboxQuerySet:
    """The sandboxes that take one of the teams' places now; a paused one has a place of its own."""
    rows = Sandbox.objects.live().filter(team__in=teams)
    return rows.filter(expires_at__gt=timezone.now()).exclude(status=SandboxStatus.PAUSED)


def counts(teams: Collection[Team]) -> dict[str, dict[str, int]]:
    """What each team uses of the limits that sandboxes count against, by team id and limit."""
    running = per_team(counted(teams))
    parked = per_team(Sandbox.objects.filter(team__in=teams, status=SandboxStatus.PAUSED))
    kept = snapshots.counts(teams)
    commands = commands_running()
    return {
        team.pk: {
            **({} if commands is None else {"max_concurrent_commands": commands.get(team.pk, 0)}),
            "max_concurrent_sandboxes": running.get(team.pk, 0),
            "max_snapshots": parked.get(team.pk, 0),
            "max_named_snapshots": kept[team.pk],
        }
        for team in teams
    }


def commands_running() -> dict[str, int] | None:
    """How many commands run of each team that has any, by its id; None if the host is silent."""
    try:
        return host().commands(seconds=COUNTING_SECONDS)
    except host_errors.HostError:
        return None


def per_team(rows: SandboxQuerySet) -> dict[str, int]:
    """How many of the rows each team has, by its id."""
    return {row["team"]: row["many"] for row in rows.values("team").annotate(many=Count("pk"))}


def boot(sandbox: Sandbox, snapshot: Snapshot | None = None) -> None:
    """Start the container and say so. Raises the host's errors."""
    info = host().create_sandbox(
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
        )
    )
    if not state.started(sandbox, info):
        # Somebody terminated it while it started.
        host().delete_sandbox(sandbox.pk)
        state.released([sandbox.pk], sandbox.driver)
        sandbox.refresh_from_db()


def abandon(sandbox: Sandbox) -> None:
    """Settle one that did not start, and leave nothing of it on the host."""
    driver = sandbox.driver
    state.broken(sandbox, FAILED_TO_START, driver=driver)
    try:
        host().delete_sandbox(sandbox.pk)
    except host_errors.HostError:
        # Who looks after what nobody drives finds it.
        return
    state.released([sandbox.pk], driver)
