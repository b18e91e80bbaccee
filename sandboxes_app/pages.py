"""The content of the sandbox pages, shared by requests and live updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from django.template.loader import render_to_string

from hostruntime.wire.background import CommandInfo
from orkestr_console.accounts.actor import Actor
from orkestr_console.core.errors import DomainError
from sandboxes_app import services
from sandboxes_app.forms import COMMAND_SECONDS
from sandboxes_app.models import Sandbox
from sandboxes_app.presenters import command_status
from sandboxes_app.services import ExecAnswer

PAGE = 50
# Of what a background command has printed.
OUTPUT_BYTES = 256 * 1024
PARTIALS = "sandboxes_app/_detail.html"


@dataclass(frozen=True)
class Entry:
    """A command and its result: an answer, or an error that may include output.

    One that was started in the background has neither yet.
    """

    command: str
    answer: ExecAnswer | None = None
    started: CommandInfo | None = None
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


@dataclass(frozen=True)
class CommandRow:
    """A background command as pages show it."""

    info: CommandInfo

    @property
    def state(self) -> dict[str, str]:
        """Its status as a badge: ``value``, ``label`` and ``tone``."""
        status = command_status(self.info)
        label = f"Exit {self.info.code}" if status == "exited" else status.capitalize()
        if self.info.out_of_memory:
            label = "Out of memory"
        good = status == "running" or self.info.code == 0
        tone = "good" if good else "quiet" if self.info.killed else "bad"
        return {"value": status, "label": label, "tone": tone}


def commands_context(commands: Sequence[CommandInfo]) -> dict[str, Any]:
    """The background commands of one sandbox; ``running`` if there is anything to wait for."""
    rows = [CommandRow(command) for command in commands]
    return {"commands": rows, "running": any(row.info.running for row in rows)}


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
