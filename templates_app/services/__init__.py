"""What can be done with templates. Console, REST and MCP all come through here."""

from __future__ import annotations

from templates_app.services.bases import BaseChoice, Source, list_bases, reclaimable_bytes, resolve
from templates_app.services.direct import advice as direct_advice
from templates_app.services.events import (
    EventPage,
    Told,
    all_events,
    follow_events,
    read_events,
)
from templates_app.services.log import log_text
from templates_app.services.lost import IMAGE_LOST, give_image, note_lost, settle_images
from templates_app.services.metering import note_image_bytes
from templates_app.services.queue import Place, pass_on, place
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
    note_used,
    template_usage,
)

__all__ = [
    "IMAGE_LOST",
    "BaseChoice",
    "EventPage",
    "Place",
    "ShownStep",
    "Source",
    "TemplateUsage",
    "Told",
    "all_events",
    "cancel_template",
    "counts",
    "create_template",
    "delete_template",
    "direct_advice",
    "follow_events",
    "get_template",
    "give_image",
    "list_bases",
    "list_steps",
    "list_templates",
    "log_text",
    "note_image_bytes",
    "note_lost",
    "note_used",
    "pass_on",
    "place",
    "read_events",
    "reclaimable_bytes",
    "resolve",
    "settle_images",
    "template_usage",
]
