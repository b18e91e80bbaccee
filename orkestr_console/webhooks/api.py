"""Webhooks over REST."""

from __future__ import annotations

from django.http import HttpResponse

from orkestr_console.accounts.actor import READ, WRITE
from orkestr_console.http.decorators import ApiRequest, api
from orkestr_console.http.json_api import json_response, no_content, read_json
from orkestr_console.webhooks import presenters, services
from orkestr_console.webhooks.specs import WebhookSpec


@api(scope=WRITE)
def create_webhook(request: ApiRequest) -> HttpResponse:
    """``POST /v1/sandboxes/webhooks``: the only answer with the secret."""
    spec = read_json(request, WebhookSpec)
    webhook, secret = services.create_webhook(request.actor, spec)
    return json_response({**presenters.webhook_detail(webhook), "secret": secret}, status=201)


@api(scope=READ)
def list_webhooks(request: ApiRequest) -> HttpResponse:
    """``GET /v1/sandboxes/webhooks``: all of them."""
    rows = services.list_webhooks(request.actor)
    return json_response({"webhooks": [presenters.webhook_detail(row) for row in rows]})


@api(scope=READ)
def get_webhook(request: ApiRequest, webhook_id: str) -> HttpResponse:
    """``GET /v1/sandboxes/webhooks/{id}``; an extension of the public API."""
    webhook = services.get_webhook(request.actor, webhook_id)
    return json_response(presenters.webhook_detail(webhook))


@api(scope=WRITE)
def delete_webhook(request: ApiRequest, webhook_id: str) -> HttpResponse:
    """``DELETE /v1/sandboxes/webhooks/{id}``."""
    services.delete_webhook(request.actor, webhook_id)
    return no_content()


@api(scope=WRITE)
def enable_webhook(request: ApiRequest, webhook_id: str) -> HttpResponse:
    """``POST …/enable``: after too many failures, or as a reset of their count."""
    webhook = services.enable_webhook(request.actor, webhook_id)
    return json_response(presenters.webhook_detail(webhook))


@api(scope=WRITE)
def send_test(request: ApiRequest, webhook_id: str) -> HttpResponse:
    """``POST …/test``: a delivery that is sent in a moment; an extension of the public API."""
    delivery = services.send_test(request.actor, webhook_id)
    return json_response(presenters.delivery_detail(delivery), status=202)


@api(scope=READ)
def list_deliveries(request: ApiRequest, webhook_id: str) -> HttpResponse:
    """``GET …/deliveries``: the latest, newest first; an extension of the public API."""
    rows = services.list_deliveries(request.actor, webhook_id)
    return json_response({"deliveries": [presenters.delivery_detail(row) for row in rows]})
