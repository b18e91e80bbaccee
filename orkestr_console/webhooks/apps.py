"""The Django app of webhooks."""

from __future__ import annotations

from django.apps import AppConfig


class WebhooksConfig(AppConfig):
    """Webhooks, and the deliveries to them."""

    name = "orkestr_console.webhooks"
    label = "webhooks"
    default_auto_field = "django.db.models.BigAutoField"
