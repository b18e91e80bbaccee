"""Operations on templates, shared by console, REST and MCP."""

from __future__ import annotations

from templates_app.services.bases import (
    BaseChoice,
    Source,
    list_bases,
    list_built_in,
    reclaimable_bytes,
    resolve,
)
from templates_app.services.direct import advice as direct_advice
from templates_app.services.events import (
    Event,
    EventPage,
    all_events,
    follow_events,
    read_events,
)
from templates_app.services.log import log_text
from templates_app.services.lost import IMAGE_LOST, adopt_image, mark_lost, settle_images
from templates_app.services.metering import note_image_bytes
from templates_app.services.naming import Found, find_templates, source_name, template_id
from templates_app.services.queue import QueuePosition, hand_off, queue_position
from templates_app.services.templates import (
    StepOutput,
    TemplateUsage,
    cancel_template,
    create_template,
    delete_template,
    get_template,
    list_steps,
    list_templates,
    mark_used,
    template_usage,
    usage_counts,
)

__all__ = [
    "IMAGE_LOST",
    "BaseChoice",
    "Event",
    "EventPage",
    "Found",
    "QueuePosition",
    "Source",
    "StepOutput",
    "TemplateUsage",
    "adopt_image",
    "all_events",
    "cancel_template",
    "create_template",
    "delete_template",
    "direct_advice",
    "find_templates",
    "follow_events",
    "get_template",
    "hand_off",
    "list_bases",
    "list_built_in",
    "list_steps",
    "list_templates",
    "log_text",
    "mark_lost",
    "mark_used",
    "note_image_bytes",
    "queue_position",
    "read_events",
    "reclaimable_bytes",
    "resolve",
    "settle_images",
    "source_name",
    "template_id",
    "template_usage",
    "usage_counts",
]
