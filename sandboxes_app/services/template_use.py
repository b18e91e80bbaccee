"""What uses a template now: its owner should know before deleting it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from orkestr_console.accounts.actor import Actor
from sandboxes_app.models import Sandbox
from templates_app import services as templates
from templates_app.models import Template

MAX_LISTED = 50


@dataclass(frozen=True)
class TemplateUse:
    """The live sandboxes of a template, newest first and at most ``MAX_LISTED`` of ``count``.

    ``derived`` is how many templates were built on it. ``reclaimable_bytes`` is what deleting it
    frees, once those sandboxes have ended; None if the host doesn't answer.
    """

    template: Template
    sandboxes: list[Sandbox]
    count: int
    derived: int
    last_used_at: datetime | None
    reclaimable_bytes: int | None


def template_use(actor: Actor, template_id: str) -> TemplateUse:
    """What uses one of the team's templates. Raises ``NotFound``.

    Sandboxes and templates created from it keep working when it is deleted.
    """
    template = templates.get_template(actor, template_id)
    live = Sandbox.objects.for_team(actor.team).live().filter(template=template.pk)
    derived = Template.objects.for_team(actor.team).filter(base_template=template.pk)
    return TemplateUse(
        template=template,
        sandboxes=list(live.order_by("-created_at", "-pk")[:MAX_LISTED]),
        count=live.count(),
        derived=derived.count(),
        last_used_at=template.last_used_at,
        reclaimable_bytes=templates.reclaimable_bytes(template),
    )
