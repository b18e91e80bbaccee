"""Notices to pages that a sandbox changed. A notice is a pointer; its receiver reads the row."""

from __future__ import annotations

from collections.abc import Sequence

from orkestr_console.core.channel_layer import notify_all, payloads


def sandbox_group(sandbox_id: str) -> str:
    """The channel group of one sandbox's viewers."""
    return f"sandbox.{sandbox_id}"


def sandboxes_group(team_id: str) -> str:
    """The channel group of the viewers of a team's list."""
    return f"team.{team_id}.sandboxes"


def change_payloads(sandbox_id: str, team_id: str) -> list[str]:
    """The notices of a new state, for a statement that makes it: to its page, and the list."""
    return payloads(change_messages([(sandbox_id, team_id)]))


def notify_many_changed(sandboxes: Sequence[tuple[str, str]]) -> None:
    """Notify the pages of sandboxes, by their ids and teams' ids, and each list once. On commit."""
    notify_all(change_messages(sandboxes))


def change_messages(sandboxes: Sequence[tuple[str, str]]) -> dict[str, dict[str, str]]:
    """The notices of new states, by group."""
    messages = {
        sandbox_group(sandbox_id): change_message(sandbox_id) for sandbox_id, _ in sandboxes
    }
    messages |= {
        sandboxes_group(team_id): change_message(sandbox_id) for sandbox_id, team_id in sandboxes
    }
    return messages


def change_message(sandbox_id: str) -> dict[str, str]:
    """The notice that a sandbox changed."""
    return {"type": "sandbox.changed", "id": sandbox_id}
