"""Using a sandbox: finding it by id or name, and telling how it is in every answer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Annotated

from django.utils import timezone
from pydantic import Field

from orkestr_console.accounts.actor import Actor, Subject
from orkestr_console.core.errors import DomainError
from orkestr_console.http.json_api import timestamp
from orkestr_console.mcp.tool import Ctx, actor_of, call_service
from sandboxes_app import services
from sandboxes_app.models import Sandbox

# An id or a name, as the server's instructions say: this is in most tools.
SandboxId = Annotated[str, Field(description="")]


class Use:
    """A sandbox that a tool uses, and the caller, who has its row already."""

    def __init__(self, actor: Actor, sandbox: Sandbox) -> None:
        self.actor = replace(actor, subject=Subject(Sandbox, sandbox.pk, sandbox))
        self.id = sandbox.pk
        self._sandbox = sandbox
        # Without the row, which gets old.
        self._asking = replace(actor, subject=None)

    async def life(self, *, changed: bool = False) -> str:
        """How long it has left, or when and why it ended; ``changed`` if its row may have."""
        if changed or not self._sandbox.is_running:
            self._sandbox = await call_service(services.get_sandbox, self._asking, self.id)
        return await life_of(self._sandbox)


@asynccontextmanager
async def using(ctx: Ctx, reference: str) -> AsyncIterator[Use]:
    """A sandbox, by id or name; errors in the block tell how it is.

    Raises ``NotFound``, and ``Conflict`` if several have the name.
    """
    actor = actor_of(ctx)
    use = Use(actor, await call_service(services.find_named, actor, reference))
    try:
        yield use
    except DomainError as error:
        # The error is worth more than what would come with it.
        with suppress(DomainError):
            error.extra["sandbox"] = await use.life(changed=True)
        raise


async def life_of(sandbox: Sandbox) -> str:
    """How long a sandbox has left, or when and why it ended. Reads rows if it has."""
    if not sandbox.state.is_terminal:
        return life(sandbox)
    reasons = await call_service(services.end_reasons, [sandbox])
    return life(sandbox, reasons.get(sandbox.pk, ""))


def life(sandbox: Sandbox, reason: str = "") -> str:
    """The same as text."""
    if sandbox.state.is_terminal:
        ended = f"ended at {timestamp(sandbox.ended_at)}"
        return f"{ended}: {reason}" if reason else ended
    seconds = max(round((sandbox.expires_at - timezone.now()).total_seconds()), 0)
    if sandbox.is_running:
        return f"running, {'pauses' if sandbox.pauses_on_timeout else 'ends'} in {seconds} s"
    if sandbox.is_paused:
        return f"paused, ends in {seconds} s unless resumed"
    return f"{sandbox.status}, ends in {seconds} s"
