"""Pausing and resuming a sandbox: its processes are frozen, its memory and files stay.

A paused sandbox uses one of the plan's slots for paused ones instead of one for running ones, and
ends if nobody resumes it within ``MAX_PAUSE``. Its memory stays in the machine's memory, and
doesn't survive a restart of the machine.
"""

from __future__ import annotations

from datetime import timedelta

from django.utils import timezone

from hostruntime import errors as host_errors
from hostruntime.client.host_client import HostClient
from orkestr_console.accounts.actor import WRITE, Actor
from orkestr_console.accounts.audit import audited
from orkestr_console.accounts.limits import held_in_turn, wait_for_turn
from orkestr_console.core.errors import Conflict, PlanLimit
from orkestr_console.core.hosts import Steps, ask, in_steps, translate_error
from orkestr_console.queue.driving import sharing
from sandboxes_app.models import MAX_PAUSE, PAUSED_STATUSES, Sandbox, SandboxStatus
from sandboxes_app.services import state
from sandboxes_app.services.create import require_slot
from sandboxes_app.services.lifecycle import find, find_running, settle_if_missing


@in_steps
@audited("sandbox.pause", "sandbox", note=lambda s, _: {"until": s.expires_at.isoformat()})
def pause_sandbox(actor: Actor, sandbox_id: str) -> Steps[Sandbox]:
    """Pause a running sandbox; it is paused when this returns.

    Raises ``NotFound``, ``Conflict`` (not running, or the plan's number of paused ones is
    reached), ``HostUnavailable``.
    """
    actor.require(WRITE)
    sandbox = yield from find_running.steps(actor, sandbox_id)
    with sharing("pause") as driver:
        yield from mark_pausing(actor, sandbox, driver)
        yield from pause(sandbox)
    return sandbox


def mark_pausing(actor: Actor, sandbox: Sandbox, driver: str) -> Steps[None]:
    """Take one of the slots for paused sandboxes, and update the row. Raises ``Conflict``."""
    yield from wait_for_turn(actor.team)
    with held_in_turn(actor.team, actor.user) as limits:
        paused = Sandbox.objects.for_team(actor.team).filter(status__in=PAUSED_STATUSES)
        try:
            limits.require_room("max_snapshots", paused.count())
        except PlanLimit as error:
            # The code that clients know: they free a slot and try again.
            raise Conflict(error.detail, code="snapshot_cap_reached", extra=error.extra) from None
        if not state.mark_pausing(sandbox, driver):
            raise Conflict("The sandbox has just ended.", code="sandbox_not_running")


def pause(sandbox: Sandbox) -> Steps[None]:
    """Have the host freeze it, and record the result. Raises ``Conflict`` and the host's errors."""
    until = timezone.now() + MAX_PAUSE
    try:
        yield from ask(HostClient.pause_sandbox, sandbox.pk, until.timestamp())
    except host_errors.HostError as error:
        if (yield from can_roll_back(sandbox, error)):
            state.mark_pause_failed(sandbox)
        raise translate_error(error) from error
    if not state.mark_paused(sandbox, until):
        raise Conflict("The sandbox has just ended.", code="sandbox_not_running")


@in_steps
@audited("sandbox.resume", "sandbox", note=lambda s, _: {"expires_at": s.expires_at.isoformat()})
def resume_sandbox(actor: Actor, sandbox_id: str) -> Steps[Sandbox]:
    """Resume a paused sandbox, for another full lifetime.

    Raises ``NotFound``, ``Conflict`` (not paused, or missing), ``PlanLimit`` (no slot for another
    running one), ``HostUnavailable``.
    """
    actor.require(WRITE)
    sandbox = yield from find.steps(actor, sandbox_id)
    actor.require_network(sandbox.network)
    actor.require_template(sandbox.template)
    if sandbox.status != SandboxStatus.PAUSED:
        raise Conflict(
            f"The sandbox is {sandbox.status}, not paused; only a paused one can be resumed.",
            code="sandbox_not_paused",
        )
    with sharing("pause") as driver:
        yield from mark_resuming(actor, sandbox, driver)
        yield from resume(sandbox)
    return sandbox


def mark_resuming(actor: Actor, sandbox: Sandbox, driver: str) -> Steps[None]:
    """Take one of the slots for running sandboxes, and update the row.

    Raises ``PlanLimit``, ``Conflict``.
    """
    yield from wait_for_turn(actor.team)
    with held_in_turn(actor.team, actor.user) as limits:
        require_slot(actor, limits)
        if not state.mark_resuming(sandbox, driver):
            raise Conflict("The sandbox has just ended.", code="sandbox_not_paused")


def resume(sandbox: Sandbox) -> Steps[None]:
    """Have the host thaw it, and record the result. Raises ``Conflict`` and the host's errors."""
    end = timezone.now() + timedelta(seconds=sandbox.timeout_seconds)
    try:
        yield from ask(HostClient.resume_sandbox, sandbox.pk, end.timestamp())
    except host_errors.HostError as error:
        if (yield from can_roll_back(sandbox, error)):
            state.mark_resume_failed(sandbox)
        raise translate_error(error) from error
    if not state.mark_resumed(sandbox, end):
        raise Conflict("The sandbox has just ended.", code="sandbox_not_running")


def can_roll_back(sandbox: Sandbox, error: host_errors.HostError) -> Steps[bool]:
    """Whether a failed call left things as they were.

    A host that did not answer may have done it or not: that is settled once it answers
    (:mod:`sandboxes_app.services.settling`).
    """
    if isinstance(error, (host_errors.ContainerGone, host_errors.NotFound)):
        return not (yield from settle_if_missing.steps(sandbox))
    return not isinstance(error, host_errors.HostUnavailable)
