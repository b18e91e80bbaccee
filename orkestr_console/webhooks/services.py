"""Operations on webhooks, shared by console and REST."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor

from django.db import transaction
from django.db.models import Count, QuerySet

from orkestr_console.accounts import audit
from orkestr_console.accounts.actor import READ, WRITE, Actor
from orkestr_console.accounts.audit import audited
from orkestr_console.accounts.limits import held
from orkestr_console.accounts.models import Team
from orkestr_console.core.errors import InvalidInput, NotFound, RateLimited
from orkestr_console.core.ids import is_id, new_id
from orkestr_console.core.postgres import release_before_waiting
from orkestr_console.webhooks import outbox
from orkestr_console.webhooks.addresses import Target, UnreachableTarget, parse_target, resolve
from orkestr_console.webhooks.models import TEST_EVENT, Delivery, DeliveryStatus, Webhook
from orkestr_console.webhooks.signing import secret_of
from orkestr_console.webhooks.specs import WebhookSpec

NOT_FOUND = "There is no such webhook in your team; check the id."
# How long a request waits for a host name; each delivery looks it up again.
RESOLVE_SECONDS = 5.0
# The resolver may wait longer than a request does.
RESOLVERS = ThreadPoolExecutor(16, "webhook-check")
# A quarter of them, so that no team's slow names take up all.
LOOKUPS_OF_TEAM = 4
LISTED_DELIVERIES = 100


@audited("webhook.create", "webhook")
def create_webhook(actor: Actor, spec: WebhookSpec) -> tuple[Webhook, str]:
    """A new webhook and its secret, which cannot be retrieved again.

    Raises ``InvalidInput`` for an address that cannot be used, ``PlanLimit``, ``RateLimited``.
    """
    actor.require(WRITE)
    require_public(actor.team, spec.url)
    with held(actor.team, actor.user) as limits:
        rows = Webhook.objects.filter(team=limits.team)
        limits.require_room("max_webhooks", rows.count())
        webhook = Webhook.objects.create(
            team=limits.team,
            created_by=actor.user,
            url=spec.url,
            event_types=None if spec.event_types is None else list(spec.event_types),
        )
        record(actor, "webhook.create", webhook, events=webhook.event_types)
    return webhook, secret_of(webhook.pk)


class Lookups:
    """How many host names are being looked up for each team, in this process."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self.pending: Counter[str] = Counter()

    def begin(self, team_id: str, target: Target) -> Future[None]:
        """Look up the host name of an address, and check it. Raises ``RateLimited``."""
        with self._guard:
            if self.pending[team_id] >= LOOKUPS_OF_TEAM:
                raise RateLimited(
                    "The host names of other webhooks of your team are still being looked up; try "
                    "again in a moment.",
                    retry_after=int(RESOLVE_SECONDS),
                )
            self.pending[team_id] += 1
        return RESOLVERS.submit(self._look_up, team_id, target)

    def give_up(self, team_id: str, lookup: Future[None]) -> None:
        """Nobody waits for it any more: unless it has begun, it never will."""
        if lookup.cancel():
            self._end(team_id)

    def _look_up(self, team_id: str, target: Target) -> None:
        try:
            resolve(target)
        finally:
            self._end(team_id)

    def _end(self, team_id: str) -> None:
        with self._guard:
            self.pending[team_id] -= 1
            if not self.pending[team_id]:
                del self.pending[team_id]


lookups = Lookups()


def require_public(team: Team, url: str) -> None:
    """Raise ``InvalidInput`` for an address that nothing would be delivered to."""
    release_before_waiting()
    lookup = lookups.begin(team.pk, parse_target(url))
    try:
        lookup.result(RESOLVE_SECONDS)
    except TimeoutError:
        lookups.give_up(team.pk, lookup)
        refusal = "its host name could not be resolved in time"
    except UnreachableTarget as error:
        refusal = str(error)
    else:
        return
    raise InvalidInput(f"url: {refusal}; use another address.", fields={"url": f"{refusal}."})


def record(actor: Actor, action: str, webhook: Webhook, **data: object) -> None:
    """Add a change to the audit log, in its transaction."""
    audit.record(
        actor, action, kind="webhook", object_id=webhook.pk, name=webhook.url, data=dict(data)
    )


def find(actor: Actor, webhook_id: str, rows: QuerySet[Webhook] | None = None) -> Webhook:
    """One of the team's webhooks, of ``rows`` if given. Raises ``NotFound``."""
    if is_id("whk", webhook_id):
        among = Webhook.objects.all() if rows is None else rows
        found = among.filter(team=actor.team, pk=webhook_id).first()
        if found is not None:
            return found
    raise NotFound(NOT_FOUND)


def changing() -> QuerySet[Webhook]:
    """Webhooks to change: locked, but not for those who add deliveries."""
    return Webhook.objects.select_for_update(no_key=True)


def get_webhook(actor: Actor, webhook_id: str) -> Webhook:
    """One of the team's webhooks. Raises ``NotFound``."""
    actor.require(READ)
    return find(actor, webhook_id)


def list_webhooks(actor: Actor) -> list[Webhook]:
    """All of the team's webhooks, newest first."""
    actor.require(READ)
    return list(Webhook.objects.filter(team=actor.team).order_by("-created_at", "-id"))


def list_deliveries(actor: Actor, webhook_id: str) -> list[Delivery]:
    """The latest deliveries to a webhook, newest first. Raises ``NotFound``."""
    actor.require(READ)
    rows = Delivery.objects.filter(webhook=find(actor, webhook_id)).order_by("-id")
    return list(rows.defer("body")[:LISTED_DELIVERIES])


@audited("webhook.enable", "webhook")
def enable_webhook(actor: Actor, webhook_id: str) -> Webhook:
    """Send events again, and count failures from zero. Idempotent. Raises ``NotFound``."""
    actor.require(WRITE)
    with transaction.atomic():
        webhook = find(actor, webhook_id, changing())
        webhook.active, webhook.consecutive_failures, webhook.last_error = True, 0, ""
        webhook.save(update_fields=["active", "consecutive_failures", "last_error"])
        record(actor, "webhook.enable", webhook)
    return webhook


@audited("webhook.delete", "webhook")
def delete_webhook(actor: Actor, webhook_id: str) -> None:
    """Delete a webhook, with what is still to be sent to it. Raises ``NotFound``."""
    actor.require(WRITE)
    with transaction.atomic():
        # A delivery that is added after the others are deleted would keep it.
        webhook = find(actor, webhook_id, Webhook.objects.select_for_update())
        record(actor, "webhook.delete", webhook)
        webhook.delete()


@audited("webhook.test", "webhook")
def send_test(actor: Actor, webhook_id: str) -> Delivery:
    """Send a test event, once, whether the webhook is enabled or not; the pending delivery.

    While one is pending, that is returned. Raises ``NotFound``.
    """
    actor.require(WRITE)
    with transaction.atomic():
        webhook = find(actor, webhook_id, changing())
        tests = webhook.deliveries.filter(event_type=TEST_EVENT)
        if (pending := tests.filter(status=DeliveryStatus.PENDING).first()) is not None:
            return pending
        delivery_id = new_id("whd")
        body = outbox.encode_body(delivery_id, TEST_EVENT, {"webhook_id": webhook.pk})
        delivery = Delivery.objects.create(
            webhook=webhook,
            delivery_id=delivery_id,
            event_type=TEST_EVENT,
            object_id=webhook.pk,
            body=body,
        )
        outbox.wake_worker()
        record(actor, "webhook.test", webhook)
    return delivery


def usage_counts(teams: Collection[Team]) -> dict[str, dict[str, int]]:
    """Each team's usage of the limit on webhooks, by team id and limit."""
    rows = Webhook.objects.filter(team__in=teams).values("team").annotate(many=Count("pk"))
    counts = {row["team"]: row["many"] for row in rows}
    return {team.pk: {"max_webhooks": counts.get(team.pk, 0)} for team in teams}
