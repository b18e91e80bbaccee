"""What the caller's plan lets a sandbox be."""

from __future__ import annotations

from dataclasses import dataclass

from django.conf import settings

from hostruntime.errors import HostError
from orkestr_console.accounts.actor import READ, Actor
from orkestr_console.accounts.models import Plan
from orkestr_console.services.hosts import host


@dataclass(frozen=True)
class Limits:
    """The plan, this server's region, and the host's default allowlist."""

    plan: Plan
    region: str
    default_domains: list[str]


def limits(actor: Actor) -> Limits:
    """The envelope. A host that does not answer leaves the default allowlist out."""
    actor.require(READ)
    try:
        domains = host().default_domains()
    except HostError:
        domains = []
    return Limits(actor.team.plan, settings.REGION, domains)
