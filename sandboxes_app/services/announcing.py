"""What webhooks are told of a sandbox: that it was created, paused, resumed, or has ended.

Statuses on the way to another one are not told apart: a pause that fails, for example, is no event.
Nor is the end of a sandbox that never ran, whose creation was not announced.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from orkestr_console.http.json_api import timestamp
from orkestr_console.webhooks import outbox
from orkestr_console.webhooks.models import EventType
from sandboxes_app.models import Sandbox, SandboxStatus

UNKNOWN, RUNNING, PAUSED, ENDED = range(4)
TOLD_AS = {
    SandboxStatus.STARTING: UNKNOWN,
    SandboxStatus.RUNNING: RUNNING,
    SandboxStatus.PAUSING: RUNNING,
    SandboxStatus.PAUSED: PAUSED,
    SandboxStatus.RESUMING: PAUSED,
    SandboxStatus.TERMINATED: ENDED,
    SandboxStatus.FAILED: ENDED,
}
EVENTS = {
    (UNKNOWN, RUNNING): EventType.SANDBOX_CREATED,
    (RUNNING, PAUSED): EventType.SANDBOX_PAUSED,
    (PAUSED, RUNNING): EventType.SANDBOX_RESUMED,
    (RUNNING, ENDED): EventType.SANDBOX_TERMINATED,
    (PAUSED, ENDED): EventType.SANDBOX_TERMINATED,
}


def event_of(kind: str, before: str, to: str) -> EventType | None:
    """The event of a change of status, if it is one; ``kind`` is the sandbox's own event's."""
    found = EVENTS.get((TOLD_AS[SandboxStatus(before)], TOLD_AS[SandboxStatus(to)]))
    ended = found is EventType.SANDBOX_TERMINATED
    return EventType.SANDBOX_EXPIRED if ended and kind == "expired" else found


def announcement(
    sandbox: Sandbox, kind: str, from_statuses: Iterable[str], to: str, **changed: Any
) -> dict[str, Any]:
    """The parameters of the outbox's part of a statement that changes the status.

    Empty if that is no event from any of these statuses; ``told_from`` are those from which it is.
    """
    events = {before: event_of(kind, before, to) for before in from_statuses}
    told_from = [before for before, event in events.items() if event is not None]
    if not told_from:
        return {}
    event = events[told_from[0]]
    assert event is not None
    data = description(sandbox, to, **changed)
    parameters = outbox.parameters(sandbox.team_id, event, sandbox.pk, data)
    return {**parameters, "told_from": told_from}


def announce(sandbox: Sandbox, kind: str, before: str, to: str, **changed: Any) -> None:
    """Add the event to the outbox, in the transaction of the change, whose row is locked."""
    event = event_of(kind, before, to)
    if event is not None:
        data = description(sandbox, to, **changed)
        outbox.put(sandbox.team_id, event, sandbox.pk, data)


def description(
    sandbox: Sandbox,
    status: str,
    *,
    expires_at: datetime | None = None,
    error_message: str = "",
) -> dict[str, Any]:
    """What an event says of the sandbox, with what the change sets."""
    return {
        "sandbox_id": sandbox.pk,
        "status": status,
        "template": sandbox.template,
        "metadata": sandbox.metadata,
        "expires_at": timestamp(expires_at or sandbox.expires_at),
        "error_message": error_message or None,
    }
