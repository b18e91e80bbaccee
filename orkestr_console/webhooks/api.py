"""Webhooks over REST."""

from __future__ import annotations

from django.http import HttpResponse

from orkestr_console.accounts.actor import READ, WRITE
from orkestr_console.core.errors import Conflict
from orkestr_console.http.decorators import ApiRequest, api
from orkestr_console.http.describing import describe
from orkestr_console.http.json_api import json_response, no_content, read_json
from orkestr_console.webhooks import presenters, services
from orkestr_console.webhooks.answers import (
    CreatedWebhook,
    DeliveryDetail,
    DeliveryList,
    WebhookDetail,
    WebhookList,
)
from orkestr_console.webhooks.specs import WebhookSpec


@describe(
    "Create a webhook",
    body=WebhookSpec,
    example={"url": "https://hooks.example.com/orkestr", "event_types": ["sandbox.expired"]},
    answer=CreatedWebhook,
    status=201,
)
@api(scope=WRITE)
def create_webhook(request: ApiRequest) -> HttpResponse:
    """``POST /v1/sandboxes/webhooks``: the only answer with the secret."""
    spec = read_json(request, WebhookSpec)
    webhook, secret = services.create_webhook(request.actor, spec)
    created = CreatedWebhook(**presenters.webhook_detail(webhook), secret=secret)
    return json_response(created, status=201)


@describe("List webhooks", answer=WebhookList)
@api(scope=READ)
def list_webhooks(request: ApiRequest) -> HttpResponse:
    """``GET /v1/sandboxes/webhooks``: all of them."""
    rows = services.list_webhooks(request.actor)
    listed = [presenters.webhook_detail(row) for row in rows]
    return json_response(WebhookList(webhooks=listed))


@describe("Show a webhook", answer=WebhookDetail, extension=True)
@api(scope=READ)
def get_webhook(request: ApiRequest, webhook_id: str) -> HttpResponse:
    """``GET /v1/sandboxes/webhooks/{id}``; an extension of the public API."""
    webhook = services.get_webhook(request.actor, webhook_id)
    return json_response(presenters.webhook_detail(webhook))


@describe("Delete a webhook", status=204)
@api(scope=WRITE)
def delete_webhook(request: ApiRequest, webhook_id: str) -> HttpResponse:
    """``DELETE /v1/sandboxes/webhooks/{id}``."""
    services.delete_webhook(request.actor, webhook_id)
    return no_content()


@describe(
    "Enable a webhook",
    notes="After too many failures, or to reset their count.",
    answer=WebhookDetail,
)
@api(scope=WRITE)
def enable_webhook(request: ApiRequest, webhook_id: str) -> HttpResponse:
    """``POST …/enable``: after too many failures, or as a reset of their count."""
    webhook = services.enable_webhook(request.actor, webhook_id)
    return json_response(presenters.webhook_detail(webhook))


@describe(
    "Send a test delivery",
    notes="It is sent in a moment.",
    answer=DeliveryDetail,
    status=202,
    errors=(Conflict,),
    extension=True,
)
@api(scope=WRITE)
def send_test(request: ApiRequest, webhook_id: str) -> HttpResponse:
    """``POST …/test``: a delivery that is sent in a moment; an extension of the public API."""
    delivery = services.send_test(request.actor, webhook_id)
    return json_response(presenters.delivery_detail(delivery), status=202)


@describe("List deliveries", notes="The latest, newest first.", answer=DeliveryList, extension=True)
@api(scope=READ)
def list_deliveries(request: ApiRequest, webhook_id: str) -> HttpResponse:
    """``GET …/deliveries``: the latest, newest first; an extension of the public API."""
    rows = services.list_deliveries(request.actor, webhook_id)
    listed = [presenters.delivery_detail(row) for row in rows]
    return json_response(DeliveryList(deliveries=listed))
