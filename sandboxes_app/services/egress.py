"""A sandbox's outbound requests, and their results."""

from __future__ import annotations

from hostruntime.wire.health import EgressHost
from orkestr_console.accounts.actor import READ, Actor
from orkestr_console.core.hosts import host, translated_errors
from sandboxes_app.services.lifecycle import get_sandbox


def list_egress(actor: Actor, sandbox_id: str) -> list[EgressHost]:
    """The hosts a sandbox contacted, refused ones first; none on network ``open``.

    Raises ``NotFound``, ``HostUnavailable``.
    """
    actor.require(READ)
    sandbox = get_sandbox(actor, sandbox_id)
    if sandbox.network == "open":
        return []
    with translated_errors():
        return host().egress_hosts(sandbox.pk)
