"""The pages of webhooks: the secret once, what was sent, and what to do when nothing is."""

from __future__ import annotations

import re
from typing import Any

import pytest
from django.test import Client

from orkestr_console.accounts.models import AuditEntry, Team
from orkestr_console.webhooks.models import Delivery, Webhook
from orkestr_console.webhooks.signing import secret_of
from tests.console.markup import tight
from tests.receiving import loopback_permitted as loopback_permitted

pytestmark = pytest.mark.usefixtures("host", "loopback_permitted")
ADDRESS = "/team/webhooks/"
GOOD = {"url": "http://127.0.0.1:9/hook", "which": "all"}


def make(console: Client, **changes: Any) -> Webhook:
    answer = console.post(ADDRESS, {**GOOD, **changes})
    assert answer.status_code == 200
    return Webhook.objects.latest("created_at")


def test_the_secret_is_shown_once_and_kept_by_no_cache(console: Client) -> None:
    answer = console.post(ADDRESS, GOOD)
    webhook = Webhook.objects.get()
    assert "no-store" in answer["Cache-Control"]
    shown = re.search(r'<code id="new-secret">(whsec_\w+)</code>', tight(answer))
    assert shown
    assert shown[1] == secret_of(webhook.pk)
    for page in (ADDRESS, f"{ADDRESS}{webhook.pk}/"):
        assert "whsec_" not in tight(console.get(page))
    entry = AuditEntry.objects.get(action="webhook.create")
    assert (entry.object_id, entry.object_name) == (webhook.pk, GOOD["url"])


def test_some_events_are_chosen_or_it_is_said(console: Client) -> None:
    webhook = make(console, which="some", events=["sandbox.paused", "sandbox.resumed"])
    assert webhook.event_types == ["sandbox.paused", "sandbox.resumed"]
    assert make(console, events=["sandbox.paused"]).event_types is None
    refused = console.post(ADDRESS, {**GOOD, "which": "some"})
    assert refused.status_code == 400
    assert "Events must be chosen: at least one." in tight(refused)


@pytest.mark.parametrize("url", ["", "x", "http://10.0.0.1/", "javascript:alert(1)"])
def test_a_refused_address_is_said_at_its_field_and_kept(console: Client, url: str) -> None:
    refused = console.post(ADDRESS, {**GOOD, "url": url})
    assert refused.status_code == 400
    page = tight(refused)
    assert 'id="url-error"' in page
    assert f'name="url" value="{url}"' in page
    assert not Webhook.objects.exists()


def test_a_disabled_one_says_why_and_is_enabled(console: Client) -> None:
    webhook = make(console)
    Webhook.objects.update(active=False, consecutive_failures=20, last_error="It answered 500.")
    page = tight(console.get(f"{ADDRESS}{webhook.pk}/"))
    assert "Disabled after 20 failures in a row" in page
    assert "It answered 500." in page
    console.post(f"{ADDRESS}{webhook.pk}/enable/")
    assert "Disabled after" not in tight(console.get(f"{ADDRESS}{webhook.pk}/"))


def test_deliveries_are_asked_for_again_while_one_is_pending(console: Client) -> None:
    webhook = make(console)
    console.post(f"{ADDRESS}{webhook.pk}/test/")
    part = f"{ADDRESS}{webhook.pk}/deliveries/"
    shown = console.get(part, headers={"HX-Request": "true"})
    assert "webhook.test" in tight(shown)
    assert "load delay" in tight(shown)
    Delivery.objects.update(status="failed", error="It answered 503.", response_status=503)
    shown = console.get(part, headers={"HX-Request": "true"})
    assert "It answered 503." in tight(shown)
    assert "load delay" not in tight(shown)
    assert console.get(part)["Location"] == f"{ADDRESS}{webhook.pk}/"


def test_it_is_deleted_after_a_question(console: Client, team: Team) -> None:
    webhook = make(console)
    assert "Delete this webhook?" in tight(console.get(f"{ADDRESS}{webhook.pk}/delete/"))
    assert console.post(f"{ADDRESS}{webhook.pk}/delete/")["Location"] == ADDRESS
    assert not Webhook.objects.filter(team=team).exists()
