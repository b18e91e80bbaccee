"""Telling pages that a template changed. A notice is a pointer; whoever gets it reads the row."""

from __future__ import annotations

from orkestr_console.core.channel_layer import notify


def template_group(template_id: str) -> str:
    """The group of those who watch one template."""
    return f"template.{template_id}"


def templates_group(team_id: str) -> str:
    """The group of those who watch a team's list."""
    return f"team.{team_id}.templates"


def notify_changed(template_id: str, team_id: str) -> None:
    """The template's own state changed: its page and the team's list. Leaves on commit."""
    message = {"type": "template.changed", "id": template_id}
    notify(template_group(template_id), message)
    notify(templates_group(team_id), message)


def notify_progress(template_id: str) -> None:
    """The build has news, but the template's state is the same: its page alone."""
    notify(template_group(template_id), {"type": "template.changed", "id": template_id})
