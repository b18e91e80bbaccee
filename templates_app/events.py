"""Notices to pages that a template changed. A notice is a pointer; its receiver reads the row."""

from __future__ import annotations

from orkestr_console.core.channel_layer import notify


def template_group(template_id: str) -> str:
    """The channel group of one template's viewers."""
    return f"template.{template_id}"


def templates_group(team_id: str) -> str:
    """The channel group of the viewers of a team's list."""
    return f"team.{team_id}.templates"


def notify_changed(template_id: str, team_id: str) -> None:
    """Notify the template's page and the team's list of a new state. Sent on commit."""
    message = {"type": "template.changed", "id": template_id}
    notify(template_group(template_id), message)
    notify(templates_group(team_id), message)


def notify_progress(template_id: str) -> None:
    """Notify the template's page alone: the build progressed, but the state is the same."""
    notify(template_group(template_id), {"type": "template.changed", "id": template_id})
