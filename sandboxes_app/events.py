"""Telling pages that a sandbox changed. A notice is a pointer; whoever gets it reads the row."""

from __future__ import annotations

from collections.abc import Sequence

from orkestr_console.core.channel_layer import notify_all


def sandbox_group(sandbox_id: str) -> str:
    """The group of those who watch one sandbox."""
    return f"sandbox.{sandbox_id}"


def sandboxes_group(team_id: str) -> str:
    """The group of those who watch a team's list."""
    return f"team.{team_id}.sandboxes"


def notify_changed(sandbox_id: str, team_id: str) -> None:
    """The sandbox's state changed: its page and the team's list. Leaves on commit."""
    notify_many_changed([(sandbox_id, team_id)])


def notify_many_changed(sandboxes: Sequence[tuple[str, str]]) -> None:
    """The same of many, by their ids and their teams' ids; each list is told once."""
    messages = {
        sandbox_group(sandbox_id): change_message(sandbox_id) for sandbox_id, _ in sandboxes
    }
    messages |= {
        sandboxes_group(team_id): change_message(sandbox_id) for sandbox_id, team_id in sandboxes
    }
    notify_all(messages)


def change_message(sandbox_id: str) -> dict[str, str]:
    """What is said of it."""
    return {"type": "sandbox.changed", "id": sandbox_id}
