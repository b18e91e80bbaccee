"""Which deliveries are sent next, and the results of those that were.

Deliveries of one object to one webhook are sent one after another. Beyond that, each webhook and
each team has a number of deliveries at once, so a receiver that is slow holds up its own team at
most. Teams take turns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from django.db import connection, transaction
from django.db.models import CharField, F, Q, QuerySet, Value
from django.db.models.functions import Cast, Now

from orkestr_console.accounts import audit
from orkestr_console.accounts.actor import system_actor
from orkestr_console.queue.driving import HELD_LOCKS_SQL, LOCK_SEED, IsDriven
from orkestr_console.webhooks.models import TEST_EVENT, Delivery, DeliveryStatus, Webhook
from orkestr_console.webhooks.posting import Answer

# The advisory lock for claiming deliveries: the bytes of "hooks".
CLAIM_LOCK = 0x686F6F6B73
PER_WEBHOOK = 4
PER_TEAM = 8
ATTEMPTS = 4
RETRY_DELAY = timedelta(seconds=10)
# How long a delivery is due before somebody looks for a sender.
STRANDED = timedelta(seconds=5)
# Deliveries in a row that are given up before the webhook is disabled.
MAX_FAILURES = 20
# Rows that a clean-up changes in a transaction; the next comes within a minute.
CLEANED_UP = 10_000
# A receiver that accepts less than there is to tell falls behind, but not further than this.
LONGEST_WAIT = timedelta(days=1)
TOO_OLD = "It was not sent within a day: the receiver is too slow for the number of events."
DISABLED = f"Not sent: the webhook was disabled after {MAX_FAILURES} failures in a row."

DELIVERIES, WEBHOOKS = Delivery._meta.db_table, Webhook._meta.db_table

# It waits for no row: others change many in one statement, in whatever order they find them.
CLAIM_SQL = f"""
WITH busy AS MATERIALIZED (
    SELECT d.webhook_id, w.team_id, count(*) AS n
    FROM {DELIVERIES} d JOIN {WEBHOOKS} w ON w.id = d.webhook_id
    WHERE d.driver <> '' GROUP BY 1, 2
), busy_teams AS (
    SELECT team_id, sum(n) AS n FROM busy GROUP BY 1
), waiting AS MATERIALIZED (
    SELECT d.id, w.team_id, row_number() OVER (PARTITION BY w.team_id ORDER BY d.place, d.id)
        + coalesce((SELECT n FROM busy_teams b WHERE b.team_id = w.team_id), 0) AS turn
    FROM {WEBHOOKS} w CROSS JOIN LATERAL (
        SELECT id, row_number() OVER (ORDER BY id) AS place FROM (
            SELECT one.id FROM {DELIVERIES} one
            WHERE one.webhook_id = w.id AND one.status = 'pending' AND one.driver = ''
                AND one.next_attempt_at <= statement_timestamp()
                AND NOT EXISTS (
                    SELECT FROM {DELIVERIES} earlier
                    WHERE earlier.webhook_id = w.id AND earlier.status = 'pending'
                        AND earlier.object_id = one.object_id AND earlier.id < one.id
                )
            ORDER BY one.id
            LIMIT greatest(
                %(per_webhook)s - coalesce((SELECT n FROM busy b WHERE b.webhook_id = w.id), 0), 0
            )
        ) few
    ) d
), chosen AS MATERIALIZED (
    SELECT id FROM waiting WHERE turn <= %(per_team)s ORDER BY turn, id LIMIT %(room)s
), free AS MATERIALIZED (
    SELECT id FROM {DELIVERIES} WHERE id IN (SELECT id FROM chosen)
        AND status = 'pending' AND driver = '' FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE {DELIVERIES} d SET driver = %(driver)s, attempts = attempts + 1
FROM free, {WEBHOOKS} w
WHERE d.id = free.id AND w.id = d.webhook_id
RETURNING d.id, d.delivery_id, d.event_type, d.body, d.attempts, w.id, w.url, d.driver
"""  # noqa: S608 - names of ours

ORPHANED_SQL = f"""
SELECT DISTINCT driver FROM {DELIVERIES}
WHERE driver <> '' AND hashtextextended(driver, %s) NOT IN ({HELD_LOCKS_SQL})
"""  # noqa: S608


@dataclass(frozen=True)
class Claimed:
    """A delivery to send now, and who sends it."""

    id: int
    delivery_id: str
    event_type: str
    body: str
    attempt: int
    webhook_id: str
    url: str
    driver: str

    @property
    def is_last_attempt(self) -> bool:
        """Whether it is given up if this attempt fails: a test is not repeated."""
        return self.attempt >= ATTEMPTS or self.event_type == TEST_EVENT


def claim(driver: str, room: int) -> list[Claimed]:
    """Up to ``room`` deliveries whose turn it is. Raises ``DatabaseError``."""
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(%s)", [CLAIM_LOCK])
        cursor.execute(
            CLAIM_SQL,
            {"driver": driver, "room": room, "per_webhook": PER_WEBHOOK, "per_team": PER_TEAM},
        )
        return [Claimed(*row) for row in sorted(cursor.fetchall())]


def are_left() -> bool:
    """Whether there are deliveries that nobody sends at the moment, due or not."""
    return Delivery.objects.filter(status=DeliveryStatus.PENDING, driver="").exists()


def stranded(kind: str) -> QuerySet[Any, tuple[str, str, str]]:
    """A delivery that has been due for a while, or whose sender is gone, if there is one.

    As ``(kind, id, driver)``, to be asked for together with what else has lost its driver.
    """
    waiting = Q(driver="", next_attempt_at__lt=Now() - STRANDED)
    lost = ~Q(driver="") & ~Q(IsDriven("driver"))
    rows = Delivery.objects.filter(waiting | lost, status=DeliveryStatus.PENDING).order_by()
    return rows.values_list(Value(kind), Cast("pk", CharField()), "driver")[:1]


def orphaned_drivers() -> set[str]:
    """The senders that are gone, but had not recorded a result."""
    with connection.cursor() as cursor:
        cursor.execute(ORPHANED_SQL, [LOCK_SEED])
        return {driver for (driver,) in cursor.fetchall()}


def release(drivers: set[str]) -> None:
    """Let others send what these senders, which are gone, were sending."""
    Delivery.objects.filter(driver__in=drivers).filter(~Q(IsDriven("driver"))).update(driver="")


def conclude(claimed: Claimed, answer: Answer) -> None:
    """Record the result of an attempt, unless somebody else has it now. Safe to repeat."""
    with transaction.atomic():
        # Not a stronger lock: those who add deliveries need not wait.
        rows = Webhook.objects.select_for_update(no_key=True)
        webhook = rows.filter(pk=claimed.webhook_id).first()
        mine = Delivery.objects.filter(
            pk=claimed.id, driver=claimed.driver, status=DeliveryStatus.PENDING
        )
        result = {
            "driver": "",
            "attempted_at": Now(),
            "response_status": answer.status,
            "duration_ms": answer.duration_ms,
            "error": answer.error,
        }
        if answer.accepted:
            if mine.update(status=DeliveryStatus.DELIVERED, **result) and webhook:
                note_success(webhook, claimed)
        elif not claimed.is_last_attempt and webhook is not None and webhook.active:
            mine.update(next_attempt_at=Now() + RETRY_DELAY, **result)
        elif mine.update(status=DeliveryStatus.FAILED, **result) and webhook:
            note_failure(webhook, claimed, answer)


def note_success(webhook: Webhook, claimed: Claimed) -> None:
    """The receiver works. The caller has locked the webhook."""
    if claimed.event_type == TEST_EVENT:
        return
    Webhook.objects.filter(pk=webhook.pk).update(
        consecutive_failures=0, last_delivery_at=Now(), last_error=""
    )


def note_failure(webhook: Webhook, claimed: Claimed, answer: Answer) -> None:
    """A delivery was given up; after many in a row, so is the webhook. It is locked."""
    if claimed.event_type == TEST_EVENT:
        return
    failures = webhook.consecutive_failures + 1
    disabled = webhook.active and failures >= MAX_FAILURES
    Webhook.objects.filter(pk=webhook.pk).update(
        consecutive_failures=F("consecutive_failures") + 1,
        last_error=answer.error,
        **({"active": False} if disabled else {}),
    )
    if disabled:
        drop_pending(webhook, DISABLED)
        audit.record(
            system_actor(webhook.team),
            "webhook.disable",
            kind="webhook",
            object_id=webhook.pk,
            name=webhook.url,
            data={"failures": failures, "error": answer.error},
        )


def drop_pending(webhook: Webhook, reason: str) -> None:
    """Give up what nobody sends at the moment."""
    waiting = webhook.deliveries.filter(status=DeliveryStatus.PENDING, driver="")
    waiting.exclude(event_type=TEST_EVENT).update(status=DeliveryStatus.FAILED, error=reason)


def drop_overdue() -> None:
    """Give up what has waited for too long, but for rows that somebody else changes just now."""
    waiting = Delivery.objects.filter(status=DeliveryStatus.PENDING, driver="")
    with unclaimed(waiting.filter(created_at__lt=Now() - LONGEST_WAIT)) as overdue:
        overdue.update(status=DeliveryStatus.FAILED, error=TOO_OLD)


def forget(age: timedelta) -> None:
    """Delete the results of deliveries older than that."""
    finished = Delivery.objects.exclude(status=DeliveryStatus.PENDING)
    with unclaimed(finished.filter(created_at__lt=Now() - age)) as old:
        old.delete()


@contextmanager
def unclaimed(rows: QuerySet[Delivery]) -> Iterator[QuerySet[Delivery]]:
    """Those of some rows that nobody else has locked, locked for the block.

    Whoever deletes a team or a webhook locks its deliveries in an order of their own, so waiting
    for them could be a deadlock. What is skipped is there in a minute, or gone.
    """
    with transaction.atomic():
        free = list(
            rows.select_for_update(skip_locked=True).values_list("pk", flat=True)[:CLEANED_UP]
        )
        yield Delivery.objects.filter(pk__in=free)
