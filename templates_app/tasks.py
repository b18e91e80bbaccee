"""What the workers do for templates. Each takes ids at most, and may run twice safely."""

from __future__ import annotations

import logging
from datetime import timedelta

from django.db.models import Q
from django.utils import timezone
from django_q.models import Schedule
from django_q.tasks import schedule

from hostruntime.errors import HostError
from orkestr_console.installation import services as installation
from templates_app.models import Template, TemplateStatus
from templates_app.services import driver
from templates_app.services.lost import IMAGE_LOST

logger = logging.getLogger(__name__)

FORGET = "templates_app.tasks.forget_image"
FORGET_RETRY_DELAY = timedelta(seconds=15)
MAX_FORGET_TRIES = 240  # an hour


def drive_builds() -> None:
    """Begin the builds that may run, and go on with those whose worker was killed.

    Every minute as well: who was to ask for it may have been killed.
    """
    driver.drive()


def forget_image(image_id: str, tries: int = 1) -> None:
    """Drop the build and the image of a deleted template, or of a build that was cancelled.

    A host that does not answer is asked again: its build would go on otherwise, for hours maybe.
    """
    try:
        driver.discard(image_id)
    except HostError as error:
        logger.warning("image %s stays for now (try %d): %s", image_id, tries, error.detail)
        if tries < MAX_FORGET_TRIES:
            next_run = timezone.now() + FORGET_RETRY_DELAY
            schedule(FORGET, image_id, tries + 1, schedule_type=Schedule.ONCE, next_run=next_run)


def reconcile_images() -> None:
    """Have the host set aside images that no template names, and that are older than 10 minutes."""
    # What a build that did not end well left behind nobody can boot; one that was lost may be back.
    live = Template.objects.exclude(Q(status=TemplateStatus.FAILED) & ~Q(error_code=IMAGE_LOST))
    known_images = list(live.values_list("image_id", flat=True))
    try:
        result = installation.reconcile(images=known_images)
    except HostError as error:
        logger.warning("images were not reconciled: %s", error.detail)
        return
    if result is not None:
        installation.note_waiting(len(result.waiting))
