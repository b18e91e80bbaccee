"""A team's limits: its plan, ceilings agreed with it, and limits set by its admins."""

from __future__ import annotations

from typing import ClassVar

from django.core.validators import MaxValueValidator, MinValueValidator
from django.db import models
from django.utils import timezone

# No plan may allow more: nobody else has a build's resources meanwhile.
MAX_BUILD_SECONDS = 6 * 3600
BUILD_TIMES = [MinValueValidator(1), MaxValueValidator(MAX_BUILD_SECONDS)]


class Plan(models.Model):
    """The ceilings of teams. The operator edits the rows."""

    code = models.CharField(max_length=32, primary_key=True)
    name = models.CharField(max_length=100)
    max_templates = models.PositiveIntegerField()
    max_concurrent_builds = models.PositiveIntegerField()
    max_concurrent_sandboxes = models.PositiveIntegerField()
    max_concurrent_commands = models.PositiveIntegerField(default=32)
    allowed_sizes = models.JSONField(default=list)
    max_timeout_seconds = models.PositiveIntegerField()
    max_snapshots = models.PositiveIntegerField()
    max_named_snapshots = models.PositiveIntegerField()
    snapshot_disk_mb = models.PositiveIntegerField(default=0)
    allow_open_network = models.BooleanField()
    custom_egress_allowlist = models.BooleanField()
    step_timeout_seconds = models.PositiveIntegerField(validators=BUILD_TIMES)
    build_timeout_seconds = models.PositiveIntegerField(validators=BUILD_TIMES)
    max_running_lifetime_seconds = models.PositiveIntegerField(null=True, blank=True)
    max_volumes = models.PositiveIntegerField(default=0)
    volume_disk_mb = models.PositiveIntegerField(default=0)
    max_webhooks = models.PositiveIntegerField(default=10)
    template_disk_mb = models.PositiveIntegerField(default=0)
    api_requests_per_minute = models.PositiveIntegerField(default=600)

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.CheckConstraint(
                condition=models.Q(
                    build_timeout_seconds__range=(1, MAX_BUILD_SECONDS),
                    step_timeout_seconds__range=(1, MAX_BUILD_SECONDS),
                ),
                name="plan_build_times_within_the_queues",
            ),
        ]

    def __str__(self) -> str:
        return self.name


def optional(**options: object) -> models.PositiveIntegerField[int | None, int | None]:
    """A number that may be absent: then the next one applies."""
    return models.PositiveIntegerField(null=True, blank=True, **options)  # type: ignore[arg-type]


class LimitNumbers(models.Model):
    """An optional number for each numeric limit of a plan."""

    max_templates = optional()
    max_concurrent_builds = optional()
    max_concurrent_sandboxes = optional()
    max_concurrent_commands = optional()
    max_timeout_seconds = optional()
    max_snapshots = optional()
    max_named_snapshots = optional()
    snapshot_disk_mb = optional()
    max_volumes = optional()
    volume_disk_mb = optional()
    max_webhooks = optional()
    template_disk_mb = optional()
    step_timeout_seconds = optional(validators=BUILD_TIMES)
    build_timeout_seconds = optional(validators=BUILD_TIMES)
    api_requests_per_minute = optional()

    class Meta:
        abstract = True


class Agreement(LimitNumbers):
    """Ceilings agreed with one team in place of its plan's. Only an operator writes these."""

    team = models.OneToOneField(
        "accounts.Team", on_delete=models.CASCADE, primary_key=True, related_name="agreement"
    )
    note = models.TextField(blank=True, default="")

    def __str__(self) -> str:
        return f"agreed with {self.team_id}"


class TeamLimits(LimitNumbers):
    """What a team's admins allow within the ceilings. Null means up to the ceiling.

    ``member_…`` is each person's share, unless their membership has one of its own.
    """

    team = models.OneToOneField(
        "accounts.Team", on_delete=models.CASCADE, primary_key=True, related_name="limits"
    )
    allowed_sizes = models.JSONField(null=True, blank=True)
    allowed_networks = models.JSONField(null=True, blank=True)
    allowed_bases = models.JSONField(null=True, blank=True)
    member_max_templates = optional()
    member_max_concurrent_sandboxes = optional()
    updated_at = models.DateTimeField(default=timezone.now)
    updated_by = models.ForeignKey(
        "accounts.User", on_delete=models.SET_NULL, null=True, blank=True, related_name="+"
    )

    class Meta:
        verbose_name_plural = "team limits"

    def __str__(self) -> str:
        return f"limits of {self.team_id}"
