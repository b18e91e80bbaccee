"""Worker tasks for templates. Each takes ids only, and is safe to run twice."""

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
    """Start the builds that may run, and resume those whose worker was killed.

    Also runs every minute: the process that should have queued it may have been killed.
    """
    driver.drive()


def forget_image(image_id: str, tries: int = 1) -> None:
    """Discard the build and image of a deleted template or a cancelled build.

    Retried while the host doesn't answer: otherwise its build could keep running for hours.
    """
    try:
        driver.discard(image_id)
    except HostError as error:
        logger.warning("could not delete image %s (try %d): %s", image_id, tries, error.detail)
        if tries < MAX_FORGET_TRIES:
            next_run = timezone.now() + FORGET_RETRY_DELAY
            schedule(FORGET, image_id, tries + 1, schedule_type=Schedule.ONCE, next_run=next_run)


def reconcile_images() -> None:
    """Have the host quarantine images older than 10 minutes that no template refers to."""
    # Nobody can boot what a failed build left behind; a lost image may come back.
    live = Template.objects.exclude(Q(status=TemplateStatus.FAILED) & ~Q(error_code=IMAGE_LOST))
    known_images = list(live.values_list("image_id", flat=True))
    try:
        result = installation.reconcile(images=known_images)
    except HostError as error:
        logger.warning("could not reconcile images: %s", error.detail)
        return
    if result is not None:
        installation.record_waiting(len(result.waiting))
