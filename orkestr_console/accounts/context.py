"""What every console page may show of the caller: their team and its plan."""

from __future__ import annotations

from typing import Any

from django.http import HttpRequest

from orkestr_console.accounts.actor import Actor


def team_and_plan(request: HttpRequest) -> dict[str, Any]:
    """``actor``, ``team`` and ``plan`` of a signed-in request; None each where nobody is."""
    actor: Actor | None = getattr(request, "actor", None)
    if actor is None:
        return {"actor": None, "team": None, "plan": None}
    return {"actor": actor, "team": actor.team, "plan": actor.team.plan}
