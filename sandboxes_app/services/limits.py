"""The limits on the caller's sandboxes."""

from __future__ import annotations

from dataclasses import dataclass

from django.conf import settings

from hostruntime.errors import HostError
from orkestr_console.accounts.actor import READ, Actor
from orkestr_console.accounts.limits import Envelope, envelope
from orkestr_console.core.hosts import host


@dataclass(frozen=True)
class Limits:
    """The team's envelope, this server's region, and the host's default allowlist."""

    envelope: Envelope
    region: str
    default_domains: list[str]


def limits(actor: Actor) -> Limits:
    """The limits. The default allowlist is empty if the host doesn't answer."""
    actor.require(READ)
    try:
        domains = host().default_domains()
    except HostError:
        domains = []
    return Limits(envelope(actor.team, actor.user), settings.REGION, domains)
