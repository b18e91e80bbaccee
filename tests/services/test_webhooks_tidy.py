"""Clean-ups of deliveries wait for nobody: two that wait for each other are a deadlock."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest
from django.db import connection, transaction

from orkestr_console.accounts.actor import Actor
from orkestr_console.accounts.models import Team
from orkestr_console.webhooks import claims
from orkestr_console.webhooks.models import Delivery, DeliveryStatus
from tests.receiving import loopback_permitted as loopback_permitted
from tests.services.test_webhooks import hook, put

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.usefixtures("plans", "loopback_permitted"),
]


@pytest.fixture
def overdue(team: Team, actor: Actor) -> list[int]:
    """Three deliveries that have waited for too long."""
    hook(actor, "http://127.0.0.1:9/")
    for _ in range(3):
        put(team)
    Delivery.objects.update(created_at="2026-01-01T00:00:00Z")
    return list(Delivery.objects.order_by("pk").values_list("pk", flat=True))


@contextmanager
def locked(key: int) -> Iterator[None]:
    """Somebody else has one row locked."""
    has_it, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with transaction.atomic():
            Delivery.objects.select_for_update().get(pk=key)
            has_it.set()
            leave.wait(60)
        connection.close()

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert has_it.wait(30)
        # What waited would fail, not hang.
        with connection.cursor() as cursor:
            cursor.execute("SET lock_timeout = '5s'")
        yield
    finally:
        leave.set()
        thread.join()
        with connection.cursor() as cursor:
            cursor.execute("RESET lock_timeout")


def statuses() -> list[str]:
    return [
        str(status) for status in Delivery.objects.order_by("pk").values_list("status", flat=True)
    ]


def test_what_somebody_else_changes_is_given_up_later(overdue: list[int]) -> None:
    with locked(overdue[1]):
        claims.drop_overdue()
        assert statuses() == ["failed", "pending", "failed"]
    claims.drop_overdue()
    assert statuses() == ["failed"] * 3


def test_what_somebody_else_changes_is_forgotten_later(overdue: list[int]) -> None:
    Delivery.objects.update(status=DeliveryStatus.DELIVERED)
    with locked(overdue[1]):
        claims.forget(timedelta(days=7))
        assert list(Delivery.objects.values_list("pk", flat=True)) == [overdue[1]]
    claims.forget(timedelta(days=7))
    assert not Delivery.objects.exists()
