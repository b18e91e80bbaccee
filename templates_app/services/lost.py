"""Templates whose image is missing on the host: marked as lost, and restored if it returns."""

from __future__ import annotations

from django.db import transaction
from django.utils import timezone

from orkestr_console.accounts.models import Team
from orkestr_console.core.errors import Conflict
from orkestr_console.core.hosts import host, translated_errors
from orkestr_console.core.postgres import release_connection
from templates_app.events import notify_changed
from templates_app.models import BuildStep, StepStatus, Template, TemplateStatus
from templates_app.services.record import append_event

IMAGE_LOST = "image_lost"
IMAGE_LOST_MESSAGE = (
    "The image of this template is gone from the host, or was damaged there. Rebuild the template: "
    "its recipe is still here. Sandboxes that run from it are not touched."
)


def settle_images() -> None:
    """Make ready templates and the host's images agree. Raises the host's errors.

    For a host whose state is this database's.
    """
    # Read before the host is asked: it must have what is ready now.
    ready = list(Template.objects.ready())
    release_connection()
    present = {image.id for image in host().images()}
    for template in ready:
        if template.image_id not in present:
            mark_lost(template)
    lost = Template.objects.filter(status=TemplateStatus.FAILED, error_code=IMAGE_LOST)
    for template in lost.filter(image_id__in=present):
        mark_restored(template)


def mark_lost(template: Template) -> bool:
    """Mark a ready template as failed because its image is lost; whether it was ready."""
    with transaction.atomic():
        rows = Template.objects.filter(pk=template.pk, status=TemplateStatus.READY)
        changed = rows.update(
            status=TemplateStatus.FAILED, error_code=IMAGE_LOST, error_message=IMAGE_LOST_MESSAGE
        )
        if changed:
            append_event(
                template, "image_lost", {"code": IMAGE_LOST, "message": IMAGE_LOST_MESSAGE}
            )
            notify_changed(template.pk, template.team_id)
    return changed == 1


def mark_restored(template: Template) -> None:
    """Mark a template as ready again: an operator has restored its lost image."""
    with transaction.atomic():
        rows = Template.objects.filter(
            pk=template.pk, status=TemplateStatus.FAILED, error_code=IMAGE_LOST
        )
        if rows.update(status=TemplateStatus.READY, error_code="", error_message=""):
            append_event(template, "image_restored", {})
            notify_changed(template.pk, template.team_id)


# Stands in for the recipe of an image of which only the files are left.
UNKNOWN_RECIPE = "# Put back by the operator; what the recipe was is not known."


def adopt_image(team: Team, image_id: str, name: str) -> Template:
    """Create a team's template for an image that an operator restored and no row refers to.

    Raises ``NotFound`` (the host has no such image), ``Conflict`` (a template has it already).
    """
    with translated_errors():
        image = host().image(image_id)
    now = timezone.now()
    with transaction.atomic():
        if Template.objects.filter(image_id=image_id).exists():
            raise Conflict(f"A template has the image {image_id} already.")
        template = Template.objects.create(
            team=team,
            name=name,
            base_template=image.base or "debian-12",
            base_image=image.base or "debian-12",
            recipe=[UNKNOWN_RECIPE],
            status=TemplateStatus.READY,
            image_id=image_id,
            handed_over=True,
            size_bytes=image.size_bytes,
            file_count=image.file_count,
            shared_bytes=image.shared_bytes,
            started_at=now,
            finished_at=now,
        )
        BuildStep.objects.create(
            template=template, number=1, command=UNKNOWN_RECIPE, status=StepStatus.SUCCEEDED
        )
        append_event(template, "image_restored", {})
        notify_changed(template.pk, team.pk)
    return template
