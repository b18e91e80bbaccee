"""Templates whose image the host has not: said where it is seen, and taken back when it returns."""

from __future__ import annotations

from django.db import transaction

from orkestr_console.postgres import let_go
from orkestr_console.services.hosts import host
from templates_app.events import tell_changed
from templates_app.models import Template, TemplateStatus
from templates_app.services.record import append

IMAGE_LOST = "image_lost"
MESSAGE = (
    "The image of this template is gone from the host, or was damaged there. Rebuild the template: "
    "its recipe is still here. Sandboxes that run from it are not touched."
)


def settle_images() -> None:
    """Make ready templates and the host's images agree. Raises the host's errors.

    For a host whose state is this database's.
    """
    # Before the host is asked: what is ready now it must have.
    ready = list(Template.objects.ready())
    let_go()
    there = {image.id for image in host().images()}
    for template in ready:
        if template.image_id not in there:
            note_lost(template)
    lost = Template.objects.filter(status=TemplateStatus.FAILED, error_code=IMAGE_LOST)
    for template in lost.filter(image_id__in=there):
        note_back(template)


def note_lost(template: Template) -> bool:
    """A ready template has lost its image: it failed, with a way out; whether it was ready."""
    with transaction.atomic():
        held = Template.objects.filter(pk=template.pk, status=TemplateStatus.READY)
        changed = held.update(
            status=TemplateStatus.FAILED, error_code=IMAGE_LOST, error_message=MESSAGE
        )
        if changed:
            append(template, "image_lost", {"code": IMAGE_LOST, "message": MESSAGE})
            tell_changed(template.pk, template.team_id)
    return changed == 1


def note_back(template: Template) -> None:
    """An image that was lost is there again: an operator has put it back."""
    with transaction.atomic():
        held = Template.objects.filter(
            pk=template.pk, status=TemplateStatus.FAILED, error_code=IMAGE_LOST
        )
        if held.update(status=TemplateStatus.READY, error_code="", error_message=""):
            append(template, "image_restored", {})
            tell_changed(template.pk, template.team_id)
