"""The content of the sandbox pages, shared by requests and live updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from django.template.loader import render_to_string

from orkestr_console.accounts.actor import Actor
from orkestr_console.core.errors import DomainError
from sandboxes_app import services
from sandboxes_app.forms import COMMAND_SECONDS
from sandboxes_app.models import Sandbox
from sandboxes_app.services import ExecAnswer

PAGE = 50
PARTIALS = "sandboxes_app/_detail.html"


@dataclass(frozen=True)
class Entry:
    """A command and its result: an answer, or an error that may include output."""

    command: str
    answer: ExecAnswer | None = None
    error: DomainError | None = None

    @property
    def stdout(self) -> str:
        """What it printed to standard output."""
        return self.answer.stdout if self.answer else self._error_output("stdout")

    @property
    def stderr(self) -> str:
        """What it printed to standard error."""
        return self.answer.stderr if self.answer else self._error_output("stderr")

    def _error_output(self, stream: str) -> str:
        return str(self.error.extra.get(stream, "")) if self.error else ""


def list_context(actor: Actor, status: str | None, cursor: str | None) -> dict[str, Any]:
    """A page of sandboxes, newest first."""
    rows, next_cursor = services.list_sandboxes(actor, status=status, limit=PAGE, cursor=cursor)
    return {"sandboxes": rows, "next_cursor": next_cursor, "status": status or ""}


def detail_context(sandbox: Sandbox, address: str) -> dict[str, Any]:
    """The full page of one sandbox."""
    return {"sandbox": sandbox, "address": address, "command_seconds": COMMAND_SECONDS}


def fragments(sandbox: Sandbox, address: str) -> dict[str, str]:
    """The parts of the page that change, by the id of their element."""
    context = detail_context(sandbox, address)
    return {
        f"sandbox-{part}": render_to_string(f"{PARTIALS}#{part}", context)
        for part in ("head", "banner", "side", "state")
    }
