"""Webhooks as the API presents them."""

from __future__ import annotations

from orkestr_console.http.json_api import timestamp
from orkestr_console.webhooks.answers import DeliveryDetail, WebhookDetail
from orkestr_console.webhooks.models import Delivery, Webhook


def webhook_detail(webhook: Webhook) -> WebhookDetail:
    """A webhook, on its own or in a list, without its secret."""
    return {
        "id": webhook.pk,
        "url": webhook.url,
        "event_types": webhook.event_types,
        "active": webhook.active,
        "consecutive_failures": webhook.consecutive_failures,
        "last_delivery_at": timestamp(webhook.last_delivery_at),
        "last_error": webhook.last_error or None,
        "created_at": timestamp(webhook.created_at),
    }


def delivery_detail(delivery: Delivery) -> DeliveryDetail:
    """What became of a delivery, or will."""
    return {
        "id": delivery.delivery_id,
        "event": delivery.event_type,
        "object_id": delivery.object_id,
        "status": delivery.status,
        "attempts": delivery.attempts,
        "response_status": delivery.response_status,
        "duration_ms": delivery.duration_ms,
        "error": delivery.error or None,
        "created_at": timestamp(delivery.created_at),
        "attempted_at": timestamp(delivery.attempted_at),
    }
