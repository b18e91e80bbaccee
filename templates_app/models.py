"""A Template, the steps of its build, and the events that the build reported.

A template is immutable: its recipe and base are written once. What changes is the build's state,
and only through :mod:`templates_app.services`.
"""

from __future__ import annotations

from datetime import datetime
from typing import ClassVar

from django.db import models
from django.utils import timezone

from orkestr_console.accounts.models import Team, User
from orkestr_console.core.ids import new_id

MAX_NAME_LENGTH = 100
# The error code of a build that somebody cancelled.
CANCELLED = "build_cancelled"


class TemplateStatus(models.TextChoices):
    """``building`` → ``ready`` | ``failed``; a ready one fails if its image is lost."""

    BUILDING = "building", "Building"
    READY = "ready", "Ready"
    FAILED = "failed", "Failed"

    @property
    def tone(self) -> str:
        """The badge's colour: ``busy``, ``good`` or ``bad``."""
        return {"building": "busy", "ready": "good", "failed": "bad"}[self.value]

    @property
    def is_terminal(self) -> bool:
        """Whether the build is over. A ready template still fails if the host loses its image."""
        return self is not TemplateStatus.BUILDING


class Network(models.TextChoices):
    """What a build may reach."""

    RESTRICTED = "restricted", "Restricted"
    OPEN = "open", "Open"


class Reuse(models.TextChoices):
    """Which results of earlier builds may replace running a step; none unless requested."""

    FAILED = "failed", "Completed steps of failed builds"


class TemplateQuerySet(models.QuerySet["Template"]):
    """Templates, filtered."""

    def for_team(self, team: Team) -> TemplateQuerySet:
        """One team's templates: the only entry point for callers."""
        return self.filter(team=team)

    def ready(self) -> TemplateQuerySet:
        """Templates that a sandbox can boot from."""
        return self.filter(status=TemplateStatus.READY)

    def building(self) -> TemplateQuerySet:
        """Templates whose build is not over."""
        return self.filter(status=TemplateStatus.BUILDING)

    def queued(self) -> TemplateQuerySet:
        """Builds that no driver has claimed yet."""
        return self.building().filter(started_at=None)

    def running(self) -> TemplateQuerySet:
        """Builds that have started and are not over."""
        return self.building().exclude(started_at=None)

    def using_slots(self) -> TemplateQuerySet:
        """Templates that use one of the plan's slots: a failed build uses none."""
        return self.exclude(status=TemplateStatus.FAILED)


def new_template_id() -> str:
    """A new template id. A function, so that migrations can refer to it."""
    return new_id("tmpl")


def new_image_id() -> str:
    """A new image id: of the image that the build will publish, and of the build on the host."""
    return new_id("img")


class Template(models.Model):
    """A base image and a recipe, and the image built from them."""

    id = models.CharField(max_length=40, primary_key=True, default=new_template_id, editable=False)
    team = models.ForeignKey(Team, on_delete=models.CASCADE, related_name="templates")
    created_by = models.ForeignKey(
        User, on_delete=models.SET_NULL, null=True, blank=True, related_name="templates"
    )
    name = models.CharField(max_length=MAX_NAME_LENGTH)
    base_template = models.CharField(max_length=64)
    base_image = models.CharField(max_length=64)
    recipe = models.JSONField()
    network = models.CharField(max_length=16, choices=Network.choices, default=Network.RESTRICTED)
    allow_domains = models.JSONField(null=True, blank=True)
    # Baked into the image: set for every step, and for every command of a sandbox made from it.
    env = models.JSONField(default=dict, blank=True)
    # Hosts that were refused to a step, whether it failed or not, and that an allowlist could name.
    refused_hosts = models.JSONField(default=list, blank=True)
    status = models.CharField(
        max_length=16, choices=TemplateStatus.choices, default=TemplateStatus.BUILDING
    )
    error_message = models.TextField(blank=True, default="")
    error_code = models.CharField(max_length=40, blank=True, default="")
    image_id = models.CharField(max_length=40, unique=True, default=new_image_id, editable=False)
    # The driver that follows the build now (orkestr_console.queue.driving).
    driver = models.CharField(max_length=40, blank=True, default="")
    # Whether the host ever accepted the build: if it then doesn't know it, it has lost it.
    handed_over = models.BooleanField(default=False)
    # When a driver first claimed it: until then it is queued.
    started_at = models.DateTimeField(null=True, blank=True)
    # The build's limits, in seconds and MiB; the host's defaults where there is no value.
    step_timeout_seconds = models.PositiveIntegerField(null=True, blank=True)
    build_timeout_seconds = models.PositiveIntegerField(null=True, blank=True)
    disk_mb = models.PositiveIntegerField(null=True, blank=True)
    # Whether completed steps of an earlier build may be reused instead of running them again.
    reuse = models.CharField(max_length=16, choices=Reuse.choices, blank=True, default="")
    size_bytes = models.BigIntegerField(null=True, blank=True)
    file_count = models.BigIntegerField(null=True, blank=True)
    shared_bytes = models.BigIntegerField(null=True, blank=True)
    build_ms = models.BigIntegerField(null=True, blank=True)
    # What is in the image, as the host reported: its digest, packages and baked-in environment.
    contents = models.JSONField(null=True, blank=True)
    last_used_at = models.DateTimeField(null=True, blank=True)
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    finished_at = models.DateTimeField(null=True, blank=True)

    objects = TemplateQuerySet.as_manager()

    class Meta:
        indexes: ClassVar[list[models.Index]] = [
            models.Index(fields=["team", "-created_at", "-id"]),
            models.Index(
                fields=["created_at"],
                name="template_building",
                condition=models.Q(status="building"),
            ),
        ]
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.CheckConstraint(
                condition=models.Q(status__in=TemplateStatus.values), name="template_status_known"
            ),
        ]

    def __str__(self) -> str:
        return f"{self.name} ({self.id})"

    @property
    def state(self) -> TemplateStatus:
        """The status as the enumeration, with its tone."""
        return TemplateStatus(self.status)

    @property
    def baked_env(self) -> dict[str, str] | None:
        """The variables baked into the image: its base's, /etc/environment's and its own.

        None while there is no image, and for images built before hosts reported them.
        """
        return (self.contents or {}).get("env")

    @property
    def is_ready(self) -> bool:
        """Whether a sandbox can boot from it."""
        return self.status == TemplateStatus.READY

    @property
    def is_queued(self) -> bool:
        """Whether its build is waiting for its turn."""
        return self.status == TemplateStatus.BUILDING and self.started_at is None

    @property
    def label(self) -> str:
        """The status in one word, for a badge; a build that waits for its turn is ``Queued``."""
        return "Queued" if self.is_queued else self.state.label

    @property
    def searched(self) -> str:
        """The text that the filter above the list matches, in lower case."""
        return f"{self.name} {self.id} {self.base_template} {self.status}".lower()

    @property
    def milestone(self) -> tuple[str, datetime]:
        """The time to show next to the status, and what happened then: ``("started", …)``."""
        if self.is_queued:
            return "requested", self.created_at
        if self.status == TemplateStatus.BUILDING:
            return "started", self.started_at or self.created_at
        return "built", self.created_at

    @property
    def is_cancelled(self) -> bool:
        """Whether somebody cancelled its build."""
        return self.error_code == CANCELLED

    @property
    def outcome(self) -> str:
        """The result of its build in one word: ``Ready``, ``Failed`` or ``Cancelled``."""
        return "Cancelled" if self.is_cancelled else self.state.label

    @property
    def failure_tone(self) -> str:
        """The colour of the failure banner: ``bad``, or ``busy`` if cancelled."""
        return "busy" if self.is_cancelled else "bad"

    @property
    def failure_icon(self) -> str:
        """The failure banner's icon, from ``static/img/icons.svg``."""
        return "stop" if self.is_cancelled else "alert"


class StepStatus(models.TextChoices):
    """The status of a step. ``skipped`` never ran, because an earlier step failed.

    ``cached`` was not run again: an earlier build's result was reused, as requested.
    """

    PENDING = "pending", "Pending"
    RUNNING = "running", "Running"
    CACHED = "cached", "Cached"
    SUCCEEDED = "succeeded", "Succeeded"
    FAILED = "failed", "Failed"
    SKIPPED = "skipped", "Skipped"

    @property
    def tone(self) -> str:
        """The mark's colour."""
        return {
            "pending": "quiet",
            "running": "busy",
            "cached": "good",
            "succeeded": "good",
            "failed": "bad",
            "skipped": "quiet",
        }[self.value]

    @property
    def empty_output_text(self) -> str:
        """The text shown in place of the output of a step that printed nothing."""
        return {
            "pending": "Not started yet.",
            "running": "No output yet.",
            "skipped": "Not run, because the build stopped before it.",
        }.get(self.value, "No output.")


class BuildStep(models.Model):
    """One step of a build: its command, duration, result and output."""

    template = models.ForeignKey(Template, on_delete=models.CASCADE, related_name="steps")
    number = models.PositiveIntegerField()
    command = models.TextField()
    status = models.CharField(max_length=16, choices=StepStatus.choices, default=StepStatus.PENDING)
    started_at = models.DateTimeField(null=True, blank=True)
    duration_ms = models.BigIntegerField(null=True, blank=True)
    exit_code = models.IntegerField(null=True, blank=True)
    signal = models.IntegerField(null=True, blank=True)
    output = models.TextField(blank=True, default="")
    output_bytes = models.BigIntegerField(default=0)
    elided_bytes = models.BigIntegerField(default=0)
    # What the step added to the build's disk; negative if it removed more.
    added_bytes = models.BigIntegerField(null=True, blank=True)
    added_files = models.BigIntegerField(null=True, blank=True)
    # For a cached step: when it ran, and in the build of which image.
    cached_at = models.DateTimeField(null=True, blank=True)
    cached_from = models.CharField(max_length=40, blank=True, default="")
    # Hosts that the network policy refused. A step that succeeded without them may lack something.
    refused_hosts = models.JSONField(default=list, blank=True)
    # Sentences for the step's author: something it did has no lasting effect.
    warnings = models.JSONField(default=list, blank=True)

    class Meta:
        ordering: ClassVar[list[str]] = ["number"]
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(fields=["template", "number"], name="one_row_per_step"),
        ]

    def __str__(self) -> str:
        return f"step {self.number} of {self.template_id}"

    @property
    def state(self) -> StepStatus:
        """The status as the enumeration, with its tone."""
        return StepStatus(self.status)


class BuildEvent(models.Model):
    """One event of a build. Append-only; ``seq`` counts from 1, no gaps.

    ``host_seq`` is the host's own number, for events that the host reported; the console adds some.
    """

    template = models.ForeignKey(Template, on_delete=models.CASCADE, related_name="events")
    seq = models.PositiveIntegerField()
    host_seq = models.PositiveIntegerField(null=True, blank=True)
    kind = models.CharField(max_length=32)
    step = models.PositiveIntegerField(null=True, blank=True)
    payload = models.JSONField(default=dict)
    at = models.DateTimeField()

    class Meta:
        ordering: ClassVar[list[str]] = ["seq"]
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(fields=["template", "seq"], name="one_event_per_number"),
            models.UniqueConstraint(
                fields=["template", "host_seq"], name="one_event_per_host_number"
            ),
        ]

    def __str__(self) -> str:
        return f"{self.template_id} #{self.seq} {self.kind}"
