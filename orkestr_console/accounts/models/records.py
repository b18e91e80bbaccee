"""Append-only records: the audit log, and usage by day."""

from __future__ import annotations

from typing import ClassVar

from django.db import models
from django.utils import timezone

from orkestr_console.accounts.models.people import Team


class Outcome(models.TextChoices):
    """Whether an action was done or denied."""

    DONE = "done", "Done"
    DENIED = "denied", "Denied"


class AuditEntry(models.Model):
    """Who did what to which object, from where. A trigger refuses every change and deletion.

    Names are copied, not referenced: the entry outlives the person, the token and the object.
    """

    at = models.DateTimeField(default=timezone.now, editable=False)
    team_id = models.CharField(max_length=40, blank=True, default="")
    # Who: a person's email address, or "system"; and the token they used, by its shown prefix.
    who = models.CharField(max_length=254)
    user_id = models.BigIntegerField(null=True)
    token = models.CharField(max_length=64, blank=True, default="")
    surface = models.CharField(max_length=16)
    address = models.CharField(max_length=64, blank=True, default="")
    # What: "template.create" and the like.
    action = models.CharField(max_length=64)
    outcome = models.CharField(max_length=8, choices=Outcome.choices)
    code = models.CharField(max_length=40, blank=True, default="")
    detail = models.TextField(blank=True, default="")
    # To which.
    object_kind = models.CharField(max_length=32, blank=True, default="")
    object_id = models.CharField(max_length=64, blank=True, default="")
    object_name = models.CharField(max_length=254, blank=True, default="")
    data = models.JSONField(default=dict)

    class Meta:
        ordering: ClassVar[list[str]] = ["-id"]
        indexes: ClassVar[list[models.Index]] = [
            models.Index(fields=["team_id", "-id"]),
            models.Index(fields=["team_id", "action", "-id"]),
        ]

    def __str__(self) -> str:
        return f"{self.who} {self.action} {self.object_id} ({self.outcome})"


class Metric(models.TextChoices):
    """What is metered: a day's total, or its peak for bytes."""

    VCPU_SECONDS = "vcpu_seconds", "vCPU-seconds"
    GB_SECONDS = "gb_seconds", "GB-seconds"
    BUILD_SECONDS = "build_seconds", "Build seconds"
    IMAGE_BYTES = "image_bytes", "Image bytes not shared"
    SHARED_BYTES = "shared_bytes", "Image bytes shared with bases"


class UsageDay(models.Model):
    """How much of one metric a team used on one day (UTC)."""

    team = models.ForeignKey(Team, on_delete=models.CASCADE, related_name="usage_days")
    day = models.DateField()
    metric = models.CharField(max_length=16, choices=Metric.choices)
    amount = models.FloatField(default=0)

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(fields=["team", "day", "metric"], name="one_amount_a_day"),
        ]

    def __str__(self) -> str:
        return f"{self.team_id} {self.day} {self.metric}: {self.amount:g}"
