"""What can be done with templates. Console, REST and MCP all come through here."""

from __future__ import annotations

from templates_app.services.bases import BaseChoice, Source, list_bases, resolve
from templates_app.services.metering import note_image_bytes
from templates_app.services.templates import (
    ShownStep,
    TemplateUsage,
    cancel_template,
    counts,
    create_template,
    delete_template,
    get_template,
    list_steps,
    list_templates,
    template_usage,
)

__all__ = [
    "BaseChoice",
    "ShownStep",
    "Source",
    "TemplateUsage",
    "cancel_template",
    "counts",
    "create_template",
    "delete_template",
    "get_template",
    "list_bases",
    "list_steps",
    "list_templates",
    "note_image_bytes",
    "resolve",
    "template_usage",
]
