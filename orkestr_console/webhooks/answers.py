"""The shapes of what REST answers about webhooks; :mod:`…webhooks.presenters` makes them."""

from __future__ import annotations

from typing import Annotated, TypedDict

from pydantic import Field

from orkestr_console.http.describing import one_of
from orkestr_console.http.json_api import Timestamp
from orkestr_console.webhooks.models import DeliveryStatus


class WebhookDetail(TypedDict):
    """A webhook, without its secret."""

    id: str
    url: str
    event_types: Annotated[list[str] | None, Field(description="All of them if null.")]
    active: bool
    consecutive_failures: int
    last_delivery_at: Timestamp | None
    last_error: str | None
    created_at: Timestamp


class CreatedWebhook(WebhookDetail):
    """A new webhook: the only answer with its secret."""

    secret: Annotated[str, Field(description="The key of the signatures of its deliveries.")]


class WebhookList(TypedDict):
    """All webhooks of the team."""

    webhooks: list[WebhookDetail]


class DeliveryDetail(TypedDict):
    """What became of a delivery, or will."""

    id: str
    event: str
    object_id: str
    status: Annotated[str, one_of(DeliveryStatus.values)]
    attempts: int
    response_status: int | None
    duration_ms: int | None
    error: str | None
    created_at: Timestamp
    attempted_at: Timestamp | None


class DeliveryList(TypedDict):
    """The latest deliveries, newest first."""

    deliveries: list[DeliveryDetail]
