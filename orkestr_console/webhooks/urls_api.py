"""Webhooks under ``/v1``."""

from __future__ import annotations

from django.urls import path

from orkestr_console.http.decorators import methods
from orkestr_console.webhooks import api

webhooks = "sandboxes/webhooks"
one = f"{webhooks}/<str:webhook_id>"

urlpatterns = [
    path(webhooks, methods(GET=api.list_webhooks, POST=api.create_webhook)),
    path(one, methods(GET=api.get_webhook, DELETE=api.delete_webhook)),
    path(f"{one}/enable", methods(POST=api.enable_webhook)),
    path(f"{one}/test", methods(POST=api.send_test)),
    path(f"{one}/deliveries", methods(GET=api.list_deliveries)),
]
