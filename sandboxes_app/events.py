"""Notices to pages that a sandbox changed. A notice is a pointer; its receiver reads the row."""

from __future__ import annotations

from collections.abc import Sequence

from orkestr_console.core.channel_layer import notify_all


def sandbox_group(sandbox_id: str) -> str:
    """The channel group of one sandbox's viewers."""
    return f"sandbox.{sandbox_id}"


def sandboxes_group(team_id: str) -> str:
    """The channel group of the viewers of a team's list."""
    return f"team.{team_id}.sandboxes"


def notify_changed(sandbox_id: str, team_id: str) -> None:
    """Notify the sandbox's page and the team's list of a new state. Sent on commit."""
    notify_many_changed([(sandbox_id, team_id)])


def notify_many_changed(sandboxes: Sequence[tuple[str, str]]) -> None:
    """The same for many, by their ids and teams' ids; each list gets one notice."""
    messages = {
        sandbox_group(sandbox_id): change_message(sandbox_id) for sandbox_id, _ in sandboxes
    }
    messages |= {
        sandboxes_group(team_id): change_message(sandbox_id) for sandbox_id, team_id in sandboxes
    }
    notify_all(messages)


def change_message(sandbox_id: str) -> dict[str, str]:
    """The notice that a sandbox changed."""
    return {"type": "sandbox.changed", "id": sandbox_id}
