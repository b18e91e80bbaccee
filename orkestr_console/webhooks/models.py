"""Webhooks, and what was and will be sent to them."""

from __future__ import annotations

from typing import ClassVar

from django.db import models
from django.db.models import Q
from django.utils import timezone

from orkestr_console.accounts.models import Team, User
from orkestr_console.core.ids import new_id

MAX_URL_LENGTH = 2048


class EventType(models.TextChoices):
    """What a webhook can be told, as in the wire contract."""

    SANDBOX_CREATED = "sandbox.created", "Sandbox created"
    SANDBOX_PAUSED = "sandbox.paused", "Sandbox paused"
    SANDBOX_RESUMED = "sandbox.resumed", "Sandbox resumed"
    SANDBOX_TERMINATED = "sandbox.terminated", "Sandbox terminated"
    SANDBOX_EXPIRED = "sandbox.expired", "Sandbox expired"
    BUILD_FINISHED = "template.build_finished", "Template build finished"
    VOLUME_MOVED = "volume.moved", "Volume moved"
    VOLUME_EXPIRED = "volume.expired", "Volume expired"


# Sent on request only, and to the one webhook that it was requested for.
TEST_EVENT = "webhook.test"


class WebhookState(models.TextChoices):
    """Whether events are sent; not stored."""

    ACTIVE = "active", "Active"
    DISABLED = "disabled", "Disabled"

    @property
    def tone(self) -> str:
        """The badge's colour: ``good`` or ``bad``."""
        return {"active": "good", "disabled": "bad"}[self.value]


def new_webhook_id() -> str:
    """A new webhook id. A function, so that migrations can refer to it."""
    return new_id("whk")


class Webhook(models.Model):
    """An address that is told of a team's events. ``event_types`` None means all of them.

    Its secret is stored nowhere (:mod:`orkestr_console.webhooks.signing`).
    """

    id = models.CharField(max_length=40, primary_key=True, default=new_webhook_id, editable=False)
    team = models.ForeignKey(Team, on_delete=models.CASCADE, related_name="webhooks")
    created_by = models.ForeignKey(
        User, on_delete=models.SET_NULL, null=True, blank=True, related_name="+"
    )
    url = models.CharField(max_length=MAX_URL_LENGTH)
    event_types = models.JSONField(null=True, blank=True)
    active = models.BooleanField(default=True)
    # Deliveries in a row that were given up.
    consecutive_failures = models.PositiveIntegerField(default=0)
    last_delivery_at = models.DateTimeField(null=True, blank=True)
    last_error = models.TextField(blank=True, default="")
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        indexes: ClassVar[list[models.Index]] = [
            # Read by every change of a sandbox or template.
            models.Index(fields=["team"], name="webhook_active", condition=Q(active=True)),
        ]

    def __str__(self) -> str:
        return self.id

    @property
    def state(self) -> WebhookState:
        """Whether it is active, as an enumeration with a tone."""
        return WebhookState.ACTIVE if self.active else WebhookState.DISABLED


class DeliveryStatus(models.TextChoices):
    """``pending`` until it is ``delivered``, or given up as ``failed``."""

    PENDING = "pending", "Pending"
    DELIVERED = "delivered", "Delivered"
    FAILED = "failed", "Failed"

    @property
    def tone(self) -> str:
        """The badge's colour: ``busy``, ``good`` or ``bad``."""
        return {"pending": "busy", "delivered": "good", "failed": "bad"}[self.value]


class Delivery(models.Model):
    """One event for one webhook. The rows of an object are sent in the order of their ids.

    ``delivery_id`` is the event's: the same at each webhook and in each attempt.
    """

    id = models.BigAutoField(primary_key=True)
    webhook = models.ForeignKey(
        Webhook, on_delete=models.CASCADE, related_name="deliveries", db_index=False
    )
    delivery_id = models.CharField(max_length=40)
    event_type = models.CharField(max_length=40)
    object_id = models.CharField(max_length=40)
    body = models.TextField()
    status = models.CharField(
        max_length=16, choices=DeliveryStatus.choices, default=DeliveryStatus.PENDING
    )
    attempts = models.PositiveSmallIntegerField(default=0)
    next_attempt_at = models.DateTimeField(default=timezone.now)
    # Who sends it now (orkestr_console.queue.driving).
    driver = models.CharField(max_length=40, blank=True, default="")
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    attempted_at = models.DateTimeField(null=True, blank=True)
    response_status = models.PositiveSmallIntegerField(null=True, blank=True)
    duration_ms = models.PositiveIntegerField(null=True, blank=True)
    error = models.TextField(blank=True, default="")

    class Meta:
        indexes: ClassVar[list[models.Index]] = [
            models.Index(fields=["webhook", "-id"], name="delivery_of_webhook"),
            models.Index(fields=["created_at"], name="delivery_age"),
            models.Index(
                fields=["webhook", "id"], name="delivery_pending", condition=Q(status="pending")
            ),
            models.Index(
                fields=["webhook", "object_id", "id"],
                name="delivery_order",
                condition=Q(status="pending"),
            ),
            models.Index(fields=["driver"], name="delivery_driven", condition=~Q(driver="")),
        ]
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.CheckConstraint(
                condition=Q(status__in=DeliveryStatus.values), name="delivery_status_known"
            ),
        ]

    def __str__(self) -> str:
        return self.delivery_id

    @property
    def state(self) -> DeliveryStatus:
        """The status as the enumeration, with its tone."""
        return DeliveryStatus(self.status)
