"""Sandboxes by name, which is their label ``name``, and why those that ended did."""

from __future__ import annotations

from collections.abc import Iterable

from django.utils import timezone

from orkestr_console.accounts.actor import READ, Actor
from orkestr_console.core.errors import Conflict, NotFound
from orkestr_console.core.hosts import Steps, in_steps
from orkestr_console.core.ids import is_id
from orkestr_console.core.text import shorten_list
from sandboxes_app.models import Sandbox, SandboxEvent, SandboxStatus
from sandboxes_app.services.lifecycle import find

NAME = "name"
# Among how many of the last ones a sandbox that has ended is looked for.
MAX_SEARCHED = 500
MAX_SHOWN = 5
MISSING = (
    "There is no such sandbox in your team; check the id. A name is what the label 'name' in its "
    "metadata says."
)
# The events that end a sandbox, and what they say of the reason.
REASONS = {"terminated": "terminated on request", "expired": "its time was over"}


@in_steps
def find_named(actor: Actor, reference: str) -> Steps[Sandbox]:
    """The sandbox with an id or a name: a live one, or the last that ended.

    Raises ``NotFound``, and ``Conflict`` if several live ones have the name.
    """
    actor.require(READ)
    sandbox_id = reference if is_id("sbx", reference) else id_of(actor, reference)
    return (yield from find.steps(actor, sandbox_id))


def id_of(actor: Actor, name: str) -> str:
    """The id of the sandbox with a name. Raises as :func:`find_named`."""
    team = Sandbox.objects.for_team(actor.team)
    label = {"metadata__contains": {NAME: name}}
    live = team.live().filter(expires_at__gt=timezone.now(), **label).order_by("-created_at")
    ids = list(live.values_list("pk", flat=True)[: MAX_SHOWN + 1])
    if len(ids) > 1:
        shown = shorten_list(ids)
        raise Conflict(
            f"Several sandboxes are called {name!r}: {shown}; use an id.", code="ambiguous"
        )
    if ids:
        return ids[0]
    last = team.order_by("-created_at", "-pk").values("pk")[:MAX_SEARCHED]
    found = team.filter(pk__in=last, **label).order_by("-created_at", "-pk")
    if (ended := found.values_list("pk", flat=True).first()) is None:
        raise NotFound(MISSING)
    return ended


def end_reasons(sandboxes: Iterable[Sandbox]) -> dict[str, str]:
    """Why each of these that has ended did, by id, with one statement."""
    ended = {sandbox.pk: sandbox for sandbox in sandboxes if sandbox.state.is_terminal}
    failed = {key: sandbox.error_message for key, sandbox in ended.items() if sandbox.error_message}
    rest = [key for key in ended if key not in failed]
    if not rest:
        return failed
    events = SandboxEvent.objects.filter(
        sandbox__in=rest, to_status=SandboxStatus.TERMINATED
    ).values_list("sandbox_id", "kind")
    return failed | {key: REASONS.get(kind, kind) for key, kind in events}
