"""Reading sandboxes, terminating them, and expiring them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import batched
from typing import TypeGuard

from django.db import transaction
from django.utils import timezone
from django_q.tasks import async_task

from hostruntime import errors as host_errors
from hostruntime.client.host_client import HostClient
from hostruntime.host.patience import scaled
from hostruntime.wire.sandboxes import SandboxInfo
from orkestr_console.accounts import audit
from orkestr_console.accounts.actor import READ, WRITE, Actor
from orkestr_console.accounts.audit import audited
from orkestr_console.accounts.limits import envelope, held_in_turn, wait_for_turn
from orkestr_console.core.errors import Conflict, InvalidInput, NotFound, PlanLimit
from orkestr_console.core.hosts import (
    Steps,
    ask,
    host,
    in_steps,
    translate_error,
    translated_errors,
)
from orkestr_console.core.ids import is_id
from orkestr_console.core.rows import fetch
from orkestr_console.http.paging import page
from orkestr_console.queue.driving import sharing
from sandboxes_app.models import LIVE, PAUSED_STATUSES, Sandbox, SandboxStatus
from sandboxes_app.services import metering, state
from sandboxes_app.specs import TimeoutSpec

logger = logging.getLogger(__name__)

ONE_OF_TEAM = "id = %(id)s AND team_id = %(team)s"
NOT_FOUND = "There is no such sandbox in your team; check the id."
# The states in which the host must have a container.
SETTLED = (SandboxStatus.RUNNING, SandboxStatus.PAUSED)
# A container this young may belong to a create whose transaction is still open.
UNKNOWN_GRACE_SECONDS = scaled(300.0)
MAX_UNKNOWN_RELEASES = 5
# How one ends that was to be paused at its deadline.
NO_SLOT = state.End(
    "expired",
    SandboxStatus.TERMINATED,
    "It expired, and was not paused because the team has as many paused sandboxes as it may have.",
)
RELEASE = "sandboxes_app.tasks.release_sandboxes"
# A task's arguments have to fit through a socket (orkestr_console.queue.sockets).
RELEASE_BATCH = 1000


def get_sandbox(actor: Actor, sandbox_id: str) -> Sandbox:
    """One of the team's sandboxes, which may have ended. Raises ``NotFound``."""
    actor.require(READ)
    return find(actor, sandbox_id)


@in_steps
def find(actor: Actor, sandbox_id: str) -> Steps[Sandbox]:
    """The row, settled if it has expired. Raises ``NotFound``."""
    if not is_id("sbx", sandbox_id):
        raise NotFound(NOT_FOUND)
    sandbox = actor.take_subject(Sandbox, sandbox_id)
    if sandbox is None:
        sandbox = fetch(Sandbox, ONE_OF_TEAM, {"id": sandbox_id, "team": actor.team.pk})
    if sandbox is None:
        raise NotFound(NOT_FOUND)
    if sandbox.expires_at <= timezone.now() and sandbox.status in LIVE:
        yield from settle_overdue.steps(sandbox)
    return sandbox


@in_steps
def find_running(actor: Actor, sandbox_id: str) -> Steps[Sandbox]:
    """The row of a sandbox that can be used.

    Raises ``NotFound``, ``Conflict``, and ``Forbidden`` for a token that is not for its network
    or template.
    """
    sandbox = yield from find.steps(actor, sandbox_id)
    require_allowed(actor, sandbox)
    require_running(sandbox)
    return sandbox


def require_allowed(actor: Actor, sandbox: Sandbox) -> None:
    """Raise ``Forbidden`` for a token that is not for the sandbox's network or template."""
    actor.require_network(sandbox.network)
    actor.require_template(sandbox.template)


def require_running(sandbox: Sandbox) -> None:
    """Raise ``Conflict`` unless the sandbox can be used now."""
    if sandbox.status == SandboxStatus.PAUSED:
        raise Conflict("The sandbox is paused; resume it first.", code="sandbox_not_running")
    if not sandbox.is_running:
        raise Conflict(
            f"The sandbox is {sandbox.status}, not running; create another one.",
            code="sandbox_not_running",
        )


def list_sandboxes(
    actor: Actor,
    *,
    status: str | None = None,
    metadata: Mapping[str, str] | None = None,
    live: bool | None = None,
    limit: int | None = None,
    cursor: str | None = None,
) -> tuple[list[Sandbox], str | None]:
    """The team's sandboxes, newest first, and the cursor of the next page or None.

    ``metadata`` entries must all match; ``live`` ones only, or only those that are not.
    Raises ``InvalidInput`` for an unknown status.
    """
    actor.require(READ)
    if status and status not in SandboxStatus.values:
        sentence = f"must be one of {', '.join(SandboxStatus.values)}."
        raise InvalidInput(f"status: {sentence}", fields={"status": sentence})
    rows = Sandbox.objects.for_team(actor.team)
    for sandbox in rows.live().filter(expires_at__lte=timezone.now()):
        settle_overdue(sandbox)
    if status:
        rows = rows.filter(status=status)
    if live is not None:
        rows = rows.live() if live else rows.exclude(status__in=LIVE)
    if metadata:
        rows = rows.filter(metadata__contains=dict(metadata))
    return page(rows, limit, cursor)


@in_steps
@audited("sandbox.terminate", "sandbox")
def terminate_sandbox(actor: Actor, sandbox_id: str) -> Steps[Sandbox]:
    """Terminate a sandbox; one that has ended stays as it is. Raises ``NotFound``."""
    actor.require(WRITE)
    sandbox = yield from find.steps(actor, sandbox_id)
    if sandbox.status in LIVE:
        with sharing("end") as driver:
            if mark_terminated(actor, sandbox, driver):
                yield from release_driven(sandbox, driver)
                return sandbox
        # It has just ended, or the host has just refused to start it.
        sandbox = yield from find.steps(actor, sandbox_id)
    return sandbox


def mark_terminated(actor: Actor, sandbox: Sandbox, driver: str) -> bool:
    """Mark as terminated; ``driver`` releases the container. False if it has already ended.

    A process that is starting it remains its driver: the container may only exist later.
    """
    name = sandbox.template_name
    entry = audit.entry(actor, "sandbox.terminate", kind="sandbox", object_id=sandbox.pk, name=name)
    return state.mark_ended(sandbox, "terminated", sandbox.driver or driver, entry)


def release_driven(sandbox: Sandbox, driver: str) -> Steps[None]:
    """:func:`release` for who has just ended a sandbox as its ``driver``, and clears that."""
    try:
        info = yield from ask(HostClient.delete_sandbox, sandbox.pk, metering.take_counted())
        metering.count_ended(sandbox, info, driver)
    except host_errors.HostError as error:
        queue_release(sandbox.pk, error)
        state.mark_released([sandbox.pk], driver)


@in_steps
def release(sandbox_id: str) -> Steps[None]:
    """Release the container now, or by a task if the host doesn't answer, and count its usage."""
    try:
        info = yield from ask(HostClient.delete_sandbox, sandbox_id, metering.take_counted())
        metering.count_deleted(info)
    except host_errors.HostError as error:
        queue_release(sandbox_id, error)


def queue_release(sandbox_id: str, error: host_errors.HostError) -> None:
    """Leave the release to a task."""
    logger.warning("could not release sandbox %s yet: %s", sandbox_id, error.detail)
    async_task("sandboxes_app.tasks.release_sandbox", sandbox_id, group="sandboxes")


@in_steps
@audited("sandbox.timeout", "sandbox", note=lambda s, _: {"expires_at": s.expires_at.isoformat()})
def set_timeout(actor: Actor, sandbox_id: str, spec: TimeoutSpec) -> Steps[Sandbox]:
    """Let a running sandbox live ``timeout_seconds`` from now.

    Raises ``NotFound``, ``Conflict``, ``PlanLimit`` (also past the plan's longest running time).
    """
    actor.require(WRITE)
    sandbox = yield from find_running.steps(actor, sandbox_id)
    expires_at = new_expiry(actor, sandbox, spec.timeout_seconds)
    with translated_errors():
        yield from ask(HostClient.set_deadline, sandbox.pk, expires_at.timestamp())
    if not state.mark_extended(sandbox, expires_at):
        raise Conflict("The sandbox has just ended.", code="sandbox_not_running")
    return sandbox


def new_expiry(actor: Actor, sandbox: Sandbox, seconds: int) -> datetime:
    """The end of a lifetime of ``seconds`` from now. Raises ``PlanLimit`` if it is too late."""
    allowed = envelope(actor.team)
    allowed.require_at_most("max_timeout_seconds", seconds, "timeout_seconds")
    plan = allowed.plan
    end = timezone.now() + timedelta(seconds=seconds)
    longest = plan.max_running_lifetime_seconds
    started_at = sandbox.started_at or sandbox.created_at
    if longest is not None and end > started_at + timedelta(seconds=longest):
        raise PlanLimit(
            f"The {plan.name} plan lets a sandbox run for {longest} seconds without a pause, "
            "and this would be longer; create another one, or ask your administrator for a "
            "larger plan.",
            # The official SDK tells limits by their code alone.
            extra={"reason": "lifetime_cap_reached"},
        )
    return end


@in_steps
def settle_overdue(sandbox: Sandbox) -> Steps[None]:
    """Settle a sandbox that has expired by this clock, which may have been changed meanwhile.

    The host counts the seconds (:mod:`hostruntime.host.clock`): its remaining time is the truth,
    and the row is moved to match. While the host doesn't answer, or is about to pause it, the row
    stays as it is.
    """
    last_seen_event = state.last_event(sandbox) if sandbox.pauses_on_timeout else 0
    try:
        info: SandboxInfo | None = yield from ask(HostClient.sandbox, sandbox.pk)
    except host_errors.NotFound:
        info = None
    except host_errors.HostError as error:
        logger.warning("could not settle sandbox %s yet: %s", sandbox.pk, error.detail)
        return
    if sandbox.pauses_on_timeout and sandbox.is_running and is_running(info):
        if info.paused:
            yield from match_one.steps(sandbox, info, last_seen_event)
        return
    deadline = info.deadline if info is not None and info.state == "running" else None
    if deadline is None or deadline <= timezone.now().timestamp():
        expire(sandbox)
        return
    sandbox.expires_at = datetime.fromtimestamp(deadline, UTC)
    Sandbox.objects.filter(pk=sandbox.pk, status__in=LIVE).update(expires_at=sandbox.expires_at)


def expire(sandbox: Sandbox) -> None:
    """Mark a sandbox as expired. The host also ends the container on its own."""
    with transaction.atomic():
        if state.mark_ended(sandbox, "expired"):
            async_task("sandboxes_app.tasks.release_sandbox", sandbox.pk, group="sandboxes")
            return
    sandbox.refresh_from_db()


def expire_overdue() -> int:
    """Settle all teams' sandboxes that are past their deadline; how many there were."""
    due = list(Sandbox.objects.live().filter(expires_at__lte=timezone.now()))
    for sandbox in due:
        settle_overdue(sandbox)
    return len(due)


def terminate_all() -> int:
    """Mark all teams' sandboxes as terminated, as the operator ended them; how many."""
    end = state.End("terminated", SandboxStatus.TERMINATED)
    live = Sandbox.objects.live().values_list("pk", flat=True)
    return len(state.mark_many_ended(dict.fromkeys(live, end)))


@in_steps
def settle_if_missing(sandbox: Sandbox) -> Steps[bool]:
    """Settle the row if the host has no running container for it; whether it has none.

    Raises ``HostUnavailable``.
    """
    try:
        info: SandboxInfo | None = yield from ask(HostClient.sandbox, sandbox.pk)
    except host_errors.NotFound:
        info = None
    except host_errors.HostError as error:
        # Whoever asks has the host's error already, and translates no other.
        raise translate_error(error) from error
    if info is not None and info.state == "running":
        return False
    state.mark_missing(sandbox, info)
    return True


def apply_changes(changed: Iterable[SandboxInfo]) -> None:
    """Update the rows of sandboxes that the host reports as changed. Raises the host's errors."""
    known = {info.id: info for info in changed}
    end_many({key: state.end_reason(info) for key, info in known.items() if not is_running(info)})
    running = [key for key, info in known.items() if is_running(info)]
    rows = Sandbox.objects.filter(pk__in=running, status__in=SETTLED)
    match_host([sandbox for sandbox in rows if known[sandbox.pk].paused is not sandbox.is_paused])


def reconcile() -> None:
    """Make rows and containers agree, with few statements. Raises the host's errors.

    Rows in a transitional state belong to their driver (:mod:`sandboxes_app.services.settling`).
    """
    rows = Sandbox.objects.filter(status__in=SETTLED)
    # Read before the host is asked: it had a container before the row said so.
    settled = list(rows.only("pk", "status", "team_id", "expires_at"))
    known = {info.id: info for info in host().sandboxes()}
    ended = {
        sandbox.pk: known.get(sandbox.pk)
        for sandbox in settled
        if not is_running(known.get(sandbox.pk))
    }
    end_many({sandbox_id: state.end_reason(info) for sandbox_id, info in ended.items()})
    others = [sandbox for sandbox in settled if sandbox.pk not in ended]
    match_host([sandbox for sandbox in others if known[sandbox.pk].paused is not sandbox.is_paused])
    release_unknown([info for info in known.values() if is_running(info)])


def match_host(sandboxes: Sequence[Sandbox], from_statuses: Iterable[str] = LIVE) -> None:
    """Make these rows agree with the host. Raises the host's errors.

    Rows that change meanwhile, or are not in one of ``from_statuses``, stay as they are.
    """
    if not sandboxes:
        return
    last_seen_events = {sandbox.pk: state.last_event(sandbox) for sandbox in sandboxes}
    known = {info.id: info for info in host().sandboxes()}
    ends: dict[str, state.End] = {}
    for sandbox in sandboxes:
        info = known.get(sandbox.pk)
        if is_running(info):
            match_one(sandbox, info, last_seen_events[sandbox.pk])
        else:
            ends[sandbox.pk] = state.end_reason(info)
    end_many(ends, from_statuses)


@in_steps
def match_one(sandbox: Sandbox, info: SandboxInfo, last_seen_event: int) -> Steps[None]:
    """Make a row agree with its container.

    One that the host paused at its deadline takes a slot for paused ones, and ends if none is free.
    """
    if not (info.paused and sandbox.is_running and sandbox.pauses_on_timeout):
        state.match_host(sandbox, info, last_seen_event)
        return
    team = sandbox.team
    yield from wait_for_turn(team)
    with held_in_turn(team) as limits:
        paused = Sandbox.objects.for_team(team).filter(status__in=PAUSED_STATUSES)
        if paused.count() < limits.value("max_snapshots"):
            state.match_host(sandbox, info, last_seen_event)
            return
        end_many({sandbox.pk: NO_SLOT}, [SandboxStatus.RUNNING])
    sandbox.refresh_from_db()


def is_running(info: SandboxInfo | None) -> TypeGuard[SandboxInfo]:
    """Whether the host has a container, paused or not."""
    return info is not None and info.state == "running"


def end_many(ends: Mapping[str, state.End], from_statuses: Iterable[str] = LIVE) -> None:
    """Mark these as ended, and queue the release of what the host still has of them."""
    if not ends:
        return
    with transaction.atomic():
        if ended := state.mark_many_ended(ends, from_statuses):
            release_later(ended)


def release_orphaned(drivers: Mapping[str, str]) -> None:
    """Queue the release of ended sandboxes whose drivers are gone, by id and driver."""
    with transaction.atomic():
        release_later(
            [key for key, driver in drivers.items() if state.mark_released([key], driver)]
        )


def release_later(sandbox_ids: Iterable[str]) -> None:
    """Queue the release of what the host has of these, in batches."""
    for batch in batched(sandbox_ids, RELEASE_BATCH):
        async_task(RELEASE, batch, group="sandboxes")


def release_unknown(running: Collection[SandboxInfo]) -> None:
    """Release containers without a live row, except those that may just be starting.

    All whose rows have ended: that happened while the host was away. Of those without a row only a
    few at a time: if the rows are wrong, somebody should notice.
    """
    ids = [info.id for info in running]
    # A row exists before its container.
    statuses = dict(Sandbox.objects.filter(pk__in=ids).values_list("pk", "status"))
    for info in running:
        if info.id in statuses and statuses[info.id] not in LIVE:
            logger.warning("sandbox %s has ended but is running: releasing it", info.id)
            release(info.id)
    started_before = timezone.now().timestamp() - UNKNOWN_GRACE_SECONDS
    unknown = [
        info for info in running if info.id not in statuses and info.started_at < started_before
    ]
    for info in unknown[:MAX_UNKNOWN_RELEASES]:
        logger.error("sandbox %s is running but has no row: releasing it", info.id)
        release(info.id)
