"""Telling pages that a sandbox changed. A notice is a pointer; whoever gets it reads the row."""

from __future__ import annotations

from orkestr_console.channel_layer import notify


def sandbox_group(sandbox_id: str) -> str:
    """The group of those who watch one sandbox."""
    return f"sandbox.{sandbox_id}"


def sandboxes_group(team_id: str) -> str:
    """The group of those who watch a team's list."""
    return f"team.{team_id}.sandboxes"


def tell_changed(sandbox_id: str, team_id: str) -> None:
    """The sandbox's state changed: its page and the team's list. Leaves on commit."""
    message = {"type": "sandbox.changed", "id": sandbox_id}
    notify(sandbox_group(sandbox_id), message)
    notify(sandboxes_group(team_id), message)
