"""Driving a build: claim it, hand it to the host, follow it to its end.

The build itself runs on the host under the id of the image that it will publish. A driver only
follows it, and mostly waits, so it is a thread of a worker; the queue's task is done as soon as the
thread has started. A driver that dies with its worker is replaced, and the next continues after the
last event stored. So a task delivered twice builds once, and a killed worker loses nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial

from django.db import connection, transaction
from django.db.models import Max

from hostruntime import errors as host_errors
from hostruntime.host.patience import scaled
from hostruntime.wire.builds import BuildEvent as HostEvent
from hostruntime.wire.builds import Cache, StartBuild
from orkestr_console.accounts.limits import envelope
from orkestr_console.core.hosts import host
from orkestr_console.queue.driving import driving
from templates_app.models import Reuse, Template, TemplateStatus
from templates_app.services import queue
from templates_app.services.bases import sentence_end
from templates_app.services.preparing import BaseFailed, prepare_base
from templates_app.services.record import Superseded, fail_build, record

logger = logging.getLogger(__name__)

# How long the host may be unreachable (restarting, upgrading) before its build counts as lost.
PATIENCE_SECONDS = scaled(120.0)
# How long a build waits for room on the host before it fails.
ROOM_WAIT_SECONDS = 1800.0
FIRST_BACKOFF, MAX_BACKOFF = 0.1, 2.0
# The delay before a build whose driver failed is handed to another.
RETRY_SECONDS = 1.0

BUILD_LOST = (
    "The host restarted or was reset during the build. Nothing of it is "
    "left. Build the template again."
)
HOST_UNREACHABLE = (
    f"The sandbox host did not answer for {PATIENCE_SECONDS / 60:.0f} minutes, so the build was "
    "given up. Nothing of it is kept. Build the template again, or ask your operator to look at "
    "the host agent."
)
NO_ROOM = (
    "The host had no room for the build for half an hour. Build the template again when fewer "
    "sandboxes run."
)
BASE_MISSING = (
    "The base image of this template is gone, so it cannot be built. Choose another base."
)
BASE_FAILED = (
    "The base image {}, which is made when it is first used, could not be made: {} Build the "
    "template again to have it tried again."
)


def drive() -> None:
    """Claim each build whose turn it is, and follow it in the background."""
    while start_next():
        pass


def start_next() -> bool:
    """Claim and follow the next build; whether there was one.

    The driver's lock is taken before the build is claimed.
    """
    with ExitStack() as lock:
        driver = lock.enter_context(driving())
        template = queue.claim_next(driver)
        if template is None:
            return False
        # The thread releases the lock, unless it cannot be started.
        lock_to_release = lock.pop_all()
        try:
            run_in_background(partial(drive_build, template, driver, lock_to_release))
        except RuntimeError:
            lock_to_release.close()
            raise
    return True


def run_in_background(work: Callable[[], None]) -> None:
    """Do something in a daemon thread of its own."""

    def run_and_disconnect() -> None:
        try:
            work()
        except Exception:
            logger.exception("a build's driver failed; another will take over")
        finally:
            connection.close()

    threading.Thread(target=run_and_disconnect, name="build", daemon=True).start()


def drive_build(template: Template, driver: str, lock: ExitStack) -> None:
    """Follow a claimed build, then have a worker start the next."""
    with lock:
        try:
            follow(template, driver)
        except Superseded:
            discard_if_finished(template)
        except Exception:
            # Most likely the database was away. Another driver resumes from the last event stored.
            time.sleep(RETRY_SECONDS)
            queue.hand_off(template.pk, driver)
            raise
        finally:
            queue.wake_for_next()


def follow(template: Template, driver: str) -> None:
    """Start the build on the host and store its events to the last, across the host's outages.

    Raises :class:`Superseded` when another driver has it.
    """
    failing_since: float | None = None
    delay = FIRST_BACKOFF

    def heard() -> None:
        nonlocal failing_since
        failing_since = None

    while True:
        try:
            ensure_started(template, driver, heard)
            heard()
            for ended in stored_events(template, driver):
                delay = FIRST_BACKOFF
                if ended:
                    return
        except BaseFailed as error:
            give_up(template, driver, "base_failed", why_without_base(template, error))
            return
        except host_errors.HostFull:
            failing_since = failing_since or time.monotonic()
            if give_up_after(
                failing_since, ROOM_WAIT_SECONDS, template, driver, "no_room", NO_ROOM
            ):
                return
        except host_errors.HostUnavailable:
            failing_since = failing_since or time.monotonic()
            if give_up_after(
                failing_since, PATIENCE_SECONDS, template, driver, "host_lost", HOST_UNREACHABLE
            ):
                return
        except host_errors.HostError as error:
            give_up(template, driver, *failure_reason(template, error))
            return
        time.sleep(delay)
        delay = min(delay * 2, MAX_BACKOFF)


def why_without_base(template: Template, error: BaseFailed) -> str:
    """What a person is told whose build has no base to start from."""
    return BASE_FAILED.format(template.base_image, sentence_end(str(error)))


def stored_events(template: Template, driver: str) -> Iterator[bool]:
    """Store the events of a build; for each, whether it was the last."""
    for event in events_from_host(template):
        record(template, driver, event)
        if event.kind == "published":
            # It has failed if the team's disk space was used up meanwhile.
            discard_if_finished(template)
        yield event.kind in {"published", "failed"}


def events_from_host(template: Template) -> Iterator[HostEvent]:
    """The events after the last one stored."""
    last = template.events.aggregate(last=Max("host_seq"))["last"] or 0
    yield from host().build_events(template.image_id, after=last)


def ensure_started(template: Template, driver: str, heard: Callable[[], None]) -> None:
    """Start the build on the host once; the row records that it was.

    Calls ``heard`` while the host answers, which may make the build's base first.
    """
    if template.handed_over:
        host().build(template.image_id)
        return
    prepare_base(host(), template, driver, heard)
    allowed = envelope(template.team)
    step, build = template.step_timeout_seconds, template.build_timeout_seconds
    host().start_build(
        StartBuild(
            template.image_id,
            base_image=template.base_image,
            recipe=template.recipe,
            network=template.network,
            allow_domains=template.allow_domains,
            disk_mb=template.disk_mb,
            cache=cache_of(template),
            env=template.env,
            step_timeout_seconds=step or allowed.value("step_timeout_seconds"),
            build_timeout_seconds=build or allowed.value("build_timeout_seconds"),
        )
    )
    template.handed_over = True
    if not Template.objects.filter(pk=template.pk, driver=driver).update(handed_over=True):
        raise Superseded


def cache_of(template: Template) -> Cache:
    """The team whose cache this build's steps go into, and whether it may reuse from it."""
    return Cache(template.team_id, reuse=template.reuse == Reuse.FAILED)


def give_up_after(
    since: float, patience: float, template: Template, driver: str, code: str, message: str
) -> bool:
    """Give up the build once ``patience`` seconds have passed; whether they have."""
    if time.monotonic() - since < patience:
        return False
    give_up(template, driver, code, message)
    return True


def failure_reason(template: Template, error: host_errors.HostError) -> tuple[str, str]:
    """The code and message for a build that the host refused or doesn't know."""
    if isinstance(error, host_errors.ImageNotFound):
        return "base_missing", BASE_MISSING
    if isinstance(error, host_errors.NotFound) and template.handed_over:
        return "host_lost", BUILD_LOST
    logger.error("the host refused build %s: %s", template.pk, error.detail)
    return "internal", f"The host refused the build: {error.detail}"


def give_up(template: Template, driver: str, code: str, message: str) -> None:
    """Settle a build as failed, and have the host cancel it."""
    with transaction.atomic():
        rows = Template.objects.select_for_update().filter(
            pk=template.pk, driver=driver, status=TemplateStatus.BUILDING
        )
        if not rows.exists():
            raise Superseded
        fail_build(template, code, message)
    try:
        # Keep what it has published: the row may be an old one, from a backup.
        host().cancel_build(template.image_id, keep_published=True)
    except host_errors.HostError:
        logger.warning("could not cancel build %s; the reconcile pass retries", template.pk)


def discard_if_finished(template: Template) -> None:
    """Discard the build if its template was deleted, or settled by somebody else."""
    if not Template.objects.filter(pk=template.pk).exclude(status=TemplateStatus.FAILED).exists():
        discard(template.image_id)


def discard(image_id: str) -> None:
    """Cancel a build and delete its image, if there is one. Raises the host's errors."""
    host().cancel_build(image_id)
    host().delete_image(image_id)
