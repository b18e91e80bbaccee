"""Waking paused sandboxes that were created with ``auto_resume``: whatever uses one resumes it.

The first part of a call finds out (:func:`find_awake`), before anything has happened. It raises
``Asleep``, and whoever answers the call awaits what that brings along and calls again. However many
calls find a sandbox asleep, it is resumed once: those of one process wait for the same attempt, and
the status, changed by compare-and-set, decides between processes. Nobody fails for whom they wait
with: an attempt that another person's share of the plan has refused is made again with one's own.
One that has run out of time fails nobody: those who still find it asleep begin another
(:mod:`orkestr_console.http.waking`).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from time import monotonic

from hostruntime import errors as host_errors
from hostruntime.host.patience import scaled
from orkestr_console.accounts import audit
from orkestr_console.accounts.actor import Actor
from orkestr_console.core.errors import Asleep, Conflict, DomainError, NotFound, PlanLimit
from orkestr_console.core.hosts import Steps, in_steps
from orkestr_console.http.steps import run_in_threads
from orkestr_console.queue.driving import sharing
from sandboxes_app.models import Sandbox, SandboxStatus
from sandboxes_app.services import pausing
from sandboxes_app.services.lifecycle import find, require_allowed, require_running

ASLEEP = (SandboxStatus.PAUSING, SandboxStatus.PAUSED, SandboxStatus.RESUMING)
ON_THE_WAY = (SandboxStatus.PAUSING, SandboxStatus.RESUMING)
# How long another process may take to pause or resume it, and how often its row is read.
WAIT_SECONDS = scaled(20.0)
FIRST_DELAY, LONGEST_DELAY = 0.02, 0.5

type Key = tuple[asyncio.AbstractEventLoop, str]


@dataclass(frozen=True)
class Attempt:
    """One that is under way, and whose share of the plan it takes; nobody's if that is None."""

    task: asyncio.Task[None]
    user: int | None


# By event loop and sandbox.
_attempts: dict[Key, Attempt] = {}


@in_steps
def find_awake(actor: Actor, sandbox_id: str) -> Steps[Sandbox]:
    """The row of a sandbox that can be used.

    Raises ``Asleep`` for one that wakes by itself, and like
    :func:`sandboxes_app.services.lifecycle.find_running`.
    """
    sandbox = yield from find.steps(actor, sandbox_id)
    require_allowed(actor, sandbox)
    if sandbox.auto_resume and sandbox.status in ASLEEP:
        raise asleep(actor, sandbox)
    require_running(sandbox)
    return sandbox


def asleep(actor: Actor, sandbox: Sandbox) -> Asleep:
    """What says that a sandbox is asleep, and how to wake it."""
    return Asleep(
        "The sandbox is paused, and could not be resumed in time; try again.",
        partial(wake, actor, sandbox.pk),
        code="sandbox_not_running",
    )


def translate_paused(
    actor: Actor, sandbox: Sandbox, error: host_errors.HostError
) -> DomainError | None:
    """``Asleep`` if the host paused a sandbox after its row was read; None for other errors."""
    if isinstance(error, host_errors.ContainerPaused) and sandbox.auto_resume:
        return asleep(actor, sandbox)
    return None


async def wake(actor: Actor, sandbox_id: str) -> None:
    """Resume a sandbox, or wait for who does. Raises ``PlanLimit`` and ``HostUnavailable``.

    An attempt goes on if the call that began it is cancelled: others may wait for it.
    """
    key = (asyncio.get_running_loop(), sandbox_id)
    user = actor.user.pk if actor.user else None
    while True:
        attempt = _attempts.get(key)
        if attempt is None:
            task = asyncio.create_task(resume_or_wait(actor, sandbox_id))
            attempt = _attempts[key] = Attempt(task, user)
            # Before those who wait for it hear of its end.
            task.add_done_callback(partial(forget, key))
        try:
            return await asyncio.shield(attempt.task)
        except PlanLimit:
            if attempt.user == user:
                raise


def forget(key: Key, attempt: asyncio.Task[None]) -> None:
    """Drop an attempt that is over. Its error is nobody's if all who waited for it have left."""
    _attempts.pop(key, None)
    if not attempt.cancelled():
        attempt.exception()


async def resume_or_wait(actor: Actor, sandbox_id: str) -> None:
    """Resume it once it is paused, or return when it is neither paused nor on its way there."""
    give_up, delay = monotonic() + WAIT_SECONDS, FIRST_DELAY
    while await run_in_threads(resume_if_paused.steps(actor, sandbox_id)) in ON_THE_WAY:
        if monotonic() > give_up:
            return
        await asyncio.sleep(delay)
        delay = min(2 * delay, LONGEST_DELAY)


@in_steps
def resume_if_paused(actor: Actor, sandbox_id: str) -> Steps[str]:
    """Resume a paused sandbox for whoever uses it, which takes no right to write; its status.

    Raises ``NotFound``, ``PlanLimit``, ``HostUnavailable``.
    """
    sandbox = yield from find.steps(actor, sandbox_id)
    if not sandbox.is_paused:
        return sandbox.status
    with audit.denials(actor, "sandbox.resume", "sandbox", sandbox_id):
        try:
            with sharing("pause") as driver:
                yield from pausing.mark_resuming(actor, sandbox, driver)
                yield from pausing.resume(sandbox)
        except (Conflict, NotFound):
            # Somebody else was first, or it has ended: the call that is repeated finds out.
            sandbox.refresh_from_db()
            return sandbox.status
    data = {"expires_at": sandbox.expires_at.isoformat(), "auto_resume": True}
    audit.record(actor, "sandbox.resume", kind="sandbox", object_id=sandbox_id, data=data)
    return sandbox.status
