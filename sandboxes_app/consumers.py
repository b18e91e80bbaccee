"""The live side of the sandbox pages."""

from __future__ import annotations

from urllib.parse import parse_qs

from django.template.loader import render_to_string

from orkestr_console.accounts.actor import Actor
from orkestr_console.ui.live import LivePage, Message
from sandboxes_app import pages, services
from sandboxes_app.events import sandbox_group, sandboxes_group
from sandboxes_app.models import SandboxStatus


class SandboxListPage(LivePage):
    """The list: sent again whenever one of the team's sandboxes changes."""

    def channel_groups(self, actor: Actor) -> list[str]:
        """The team's sandboxes."""
        return [sandboxes_group(actor.team.pk)]

    def changes(self, actor: Actor) -> list[Message]:
        """The rows."""
        context = pages.list_context(actor, self._status(), None)
        return self.changed_fragments(
            {"sandbox-list": render_to_string("sandboxes_app/_list.html#list", context)}
        )

    def _status(self) -> str | None:
        """The status that the page filters by."""
        status = parse_qs(self.scope["query_string"].decode("latin-1")).get("status", [""])[0]
        return status if status in SandboxStatus.values else None


class SandboxPage(LivePage):
    """One sandbox: its state."""

    def channel_groups(self, actor: Actor) -> list[str]:
        """The sandbox, if it is the team's."""
        return [sandbox_group(services.get_sandbox(actor, self.sandbox_id).pk)]

    def changes(self, actor: Actor) -> list[Message]:
        """The badge, the facts, and whether commands can be run."""
        sandbox = services.get_sandbox(actor, self.sandbox_id)
        return self.changed_fragments(pages.fragments(sandbox, self.address))

    @property
    def sandbox_id(self) -> str:
        """The id in the address."""
        return str(self.scope["url_route"]["kwargs"]["sandbox_id"])
