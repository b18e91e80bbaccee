"""The outbox: what happened to sandboxes and templates, for the webhooks that want to know.

:func:`put` is called in the transaction of the change itself. So nothing is sent of a change that
is rolled back, and nothing that was committed is lost. Whoever changes an object holds its row's
lock, so an object's deliveries have its events' order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from django.db import connection
from django.db.models import Exists, OuterRef
from django.utils import timezone
from django_q.tasks import async_task

from orkestr_console.core.ids import new_id
from orkestr_console.webhooks.models import Delivery, DeliveryStatus, EventType, Webhook

DELIVER = "orkestr_console.webhooks.tasks.deliver"

# The lock waits for a deletion that has begun, and finds nothing after it: the foreign key's own
# check would fail then, and with it the change that this is about.
PUT_SQL = f"""
INSERT INTO {Delivery._meta.db_table} (
    webhook_id, delivery_id, event_type, object_id, body, status, attempts, driver, error,
    created_at, next_attempt_at
)
SELECT hook.id, %(told_id)s::text, %(told_type)s::text, %(told_object)s::text,
    %(told_body)s::text, '{DeliveryStatus.PENDING}', 0, '', '', %(told_at)s::timestamptz,
    %(told_at)s::timestamptz
FROM {Webhook._meta.db_table} hook{{source}}
WHERE hook.team_id = %(told_team)s AND hook.active
    AND (hook.event_types IS NULL OR hook.event_types @> to_jsonb(%(told_type)s::text)){{condition}}
ORDER BY hook.id FOR KEY SHARE OF hook
"""  # noqa: S608 - names of ours


def put_sql(source: str, condition: str) -> str:
    """:func:`put` as a part of a larger statement that returns something: if a condition is met.

    Its parameters are those of :func:`parameters`. Who uses it counts the rows, and then calls
    :func:`wake_worker`.
    """
    put = PUT_SQL.format(source=f", {source}", condition=f" AND {condition}")
    return f"{put.strip()} RETURNING 1"


def has_webhooks(team_column: str = "team_id") -> Exists:
    """Whether the team of a row that is read anyway has webhooks: costs no statement."""
    return Exists(Webhook.objects.filter(team=OuterRef(team_column), active=True))


def put(team_id: str, kind: EventType, object_id: str, data: Mapping[str, Any]) -> None:
    """Add an event, in the transaction that made it, for those of the team's webhooks that want it.

    ``data`` describes the object: JSON without secrets. The caller holds the object's row lock.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            PUT_SQL.format(source="", condition=""), parameters(team_id, kind, object_id, data)
        )
        wanted = cursor.rowcount > 0
    if wanted:
        wake_worker()


def parameters(
    team_id: str, kind: EventType, object_id: str, data: Mapping[str, Any]
) -> dict[str, str | datetime]:
    """What the statement says of an event."""
    delivery_id = new_id("whd")
    return {
        "told_id": delivery_id,
        "told_type": kind.value,
        "told_object": object_id,
        "told_body": encode_body(delivery_id, kind.value, data),
        "told_at": timezone.now(),
        "told_team": team_id,
    }


def encode_body(delivery_id: str, event_type: str, data: Mapping[str, Any]) -> str:
    """What is posted: the same text in each attempt, because its signature covers every byte."""
    at = timezone.now().isoformat(timespec="milliseconds").replace("+00:00", "Z")
    event = {"id": delivery_id, "type": event_type, "created_at": at, "data": dict(data)}
    return json.dumps(event, separators=(",", ":"))


def wake_worker() -> None:
    """Have a worker send what is due, once the transaction commits."""
    async_task(DELIVER, group="webhooks")
