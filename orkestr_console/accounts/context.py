"""The template context of every console page: the caller, their team and its plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from django.http import HttpRequest
from django.urls import reverse

from orkestr_console.accounts.actor import Actor
from orkestr_console.accounts.models import Role


@dataclass(frozen=True)
class MenuEntry:
    """A line of the menu."""

    label: str
    address: str


def team_and_plan(request: HttpRequest) -> dict[str, Any]:
    """``actor``, ``team`` and ``plan`` of a signed-in request; each None otherwise."""
    actor: Actor | None = getattr(request, "actor", None)
    if actor is None:
        return {"actor": None, "team": None, "plan": None, "menu": []}
    found = {"actor": actor, "team": actor.team, "plan": actor.team.plan}
    return {
        **found,
        "menu": [MenuEntry(label, reverse(name)) for label, name in menu_entries(actor)],
    }


def menu_entries(actor: Actor) -> Iterator[tuple[str, str]]:
    """The menu entries that this person may use, as label and URL name."""
    yield "People", "console:people"
    yield "Limits", "console:limits"
    yield "Usage", "console:usage"
    yield "Connect an agent", "console:connect"
    yield "API reference", "console:reference"
    yield "Webhooks", "console:webhooks"
    if actor.is_at_least(Role.ADMIN):
        yield "API tokens", "console:tokens"
        yield "Audit log", "console:audit"
    yield "Switch team", "console:teams"
    yield "Account", "console:account"
    if actor.is_operator:
        yield "Operator", "console:operator"
