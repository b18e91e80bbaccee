"""Webhooks: what is sent when, in which order, and what becomes of receivers that fail."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from django.db import connection, transaction
from django.test.utils import CaptureQueriesContext
from django_q.models import OrmQ
from pytest_django import Settings

from hostruntime.network.policy import deny_list
from orkestr_console.accounts.actor import Actor, system_actor
from orkestr_console.accounts.models import AuditEntry, Plan, Team
from orkestr_console.core.errors import InvalidInput, NotFound, PlanLimit, RateLimited
from orkestr_console.queue import driving
from orkestr_console.webhooks import claims, outbox, posting, services
from orkestr_console.webhooks.addresses import UnreachableTarget, parse_target, resolve
from orkestr_console.webhooks.claims import Claimed
from orkestr_console.webhooks.models import Delivery, EventType, Webhook
from orkestr_console.webhooks.posting import Answer
from orkestr_console.webhooks.signing import secret_of
from orkestr_console.webhooks.specs import WebhookSpec
from sandboxes_app import services as sandboxes
from sandboxes_app.models import Sandbox, SandboxStatus
from sandboxes_app.services import lifecycle, settling, state
from sandboxes_app.services.announcing import TOLD_AS, event_of
from sandboxes_app.specs import SandboxSpec
from tests.fakes.fixtures import MakeTemplate, queued, run_queue
from tests.fakes.host import FakeHost
from tests.receiving import Receiver, talking
from tests.receiving import loopback_permitted as loopback_permitted
from tests.receiving import receiver as receiver

pytestmark = [pytest.mark.usefixtures("host", "loopback_permitted"), pytest.mark.timeout(60)]
GOOD, BAD = Answer(204), Answer(500, "It answered 500.")


def hook(actor: Actor, url: str, *events: Any) -> tuple[Webhook, str]:
    return services.create_webhook(actor, WebhookSpec(url=url, event_types=list(events) or None))


def box(actor: Actor, **changes: Any) -> Sandbox:
    return sandboxes.create_sandbox(actor, SandboxSpec(template="debian-12", **changes))


def put(team: Team, object_id: str = "sbx_1", kind: EventType = EventType.SANDBOX_PAUSED) -> None:
    outbox.put(team.pk, kind, object_id, {"sandbox_id": object_id})


@pytest.fixture
def driver() -> Iterator[str]:
    with driving.driving() as name:
        yield name


@pytest.fixture
def no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed is due again at once."""
    monkeypatch.setattr(claims, "RETRY_DELAY", timedelta(0))


def attempt(driver: str, answer: Answer, room: int = 64) -> list[Claimed]:
    """Claim what is due, and have it answered."""
    claimed = claims.claim(driver, room)
    for one in claimed:
        claims.conclude(one, answer)
    return claimed


# What is sent --------------------------------------------------------------------------------


def test_a_sandboxs_life_is_told_in_order_and_signed(actor: Actor, receiver: Receiver) -> None:
    _, secret = hook(actor, receiver.url)
    sandbox = box(actor, metadata={"job": "7"})
    sandboxes.pause_sandbox(actor, sandbox.pk)
    sandboxes.resume_sandbox(actor, sandbox.pk)
    sandboxes.terminate_sandbox(actor, sandbox.pk)
    run_queue()
    words = ["created", "paused", "resumed", "terminated"]
    assert receiver.events() == [f"sandbox.{word}" for word in words]
    assert all(got.is_signed_with(secret) for got in receiver.got)
    assert not receiver.got[0].is_signed_with("whsec_other")
    first = receiver.got[0].json
    assert first["id"] == receiver.got[0].delivery
    assert (first["type"], first["data"]["sandbox_id"]) == ("sandbox.created", sandbox.pk)
    assert first["data"]["metadata"] == {"job": "7"}
    assert [got.json["data"]["status"] for got in receiver.got] == [
        "running",
        "paused",
        "running",
        "terminated",
    ]
    assert len({got.delivery for got in receiver.got}) == 4


def test_a_finished_build_is_told(
    actor: Actor, receiver: Receiver, make_template: MakeTemplate
) -> None:
    hook(actor, receiver.url, "template.build_finished")
    template = make_template(name="tools")
    run_queue()
    (got,) = receiver.got
    data = got.json["data"]
    assert (got.event, data["template_id"]) == ("template.build_finished", template.pk)
    assert (data["name"], data["status"], data["error_code"]) == ("tools", "ready", None)


def test_an_expired_sandbox_and_one_that_was_lost_differ(
    actor: Actor, receiver: Receiver, host: FakeHost
) -> None:
    expired, lost = box(actor), box(actor)
    hook(actor, receiver.url)
    lifecycle.expire(expired)
    state.mark_failed(lost, state.LOST)
    run_queue()
    told = {got.object: (got.event, got.json["data"]["error_message"]) for got in receiver.got}
    assert told == {
        expired.pk: ("sandbox.expired", None),
        lost.pk: ("sandbox.terminated", state.LOST),
    }


def test_many_that_end_together_are_all_told(actor: Actor, receiver: Receiver) -> None:
    ended = {box(actor).pk for _ in range(3)}
    hook(actor, receiver.url)
    lifecycle.terminate_all()
    run_queue()
    assert {got.object for got in receiver.got} == ended
    assert set(receiver.events()) == {"sandbox.terminated"}


@pytest.mark.parametrize(
    ("kind", "before", "to", "event"),
    [
        ("running", "starting", "running", "sandbox.created"),
        ("timeout_set", "running", "running", None),
        ("pausing", "running", "pausing", None),
        ("pause_failed", "pausing", "running", None),
        ("paused", "pausing", "paused", "sandbox.paused"),
        ("resuming", "paused", "resuming", None),
        ("resume_failed", "resuming", "paused", None),
        ("resumed", "resuming", "running", "sandbox.resumed"),
        ("expired", "paused", "terminated", "sandbox.expired"),
        ("failed", "running", "failed", "sandbox.terminated"),
        ("failed", "starting", "failed", None),
        ("terminated", "starting", "terminated", None),
    ],
)
def test_what_is_an_event(kind: str, before: str, to: str, event: str | None) -> None:
    assert event_of(kind, before, to) == event


def test_a_webhook_gets_the_events_it_asked_for_of_its_own_team(
    actor: Actor, other_actor: Actor, receiver: Receiver
) -> None:
    hook(actor, f"{receiver.url}/paused", "sandbox.paused")
    hook(other_actor, f"{receiver.url}/other")
    sandboxes.pause_sandbox(actor, box(actor).pk)
    run_queue()
    assert [(got.path, got.event) for got in receiver.got] == [("/hook/paused", "sandbox.paused")]


def test_nothing_is_sent_of_a_change_that_is_rolled_back(
    team: Team, actor: Actor, receiver: Receiver
) -> None:
    hook(actor, receiver.url)
    with pytest.raises(ZeroDivisionError), transaction.atomic():
        put(team)
        raise ZeroDivisionError
    assert (Delivery.objects.count(), queued()) == (0, [])


def test_without_a_webhook_a_change_costs_no_statement(
    actor: Actor, other_actor: Actor, receiver: Receiver
) -> None:
    """Another team's webhook is none; the check is part of a statement that is made anyway."""
    hook(other_actor, receiver.url)
    sandbox = box(actor)
    with CaptureQueriesContext(
        connection,
    ) as statements:
        state.mark_ended(sandbox, "terminated")
    assert len(statements) == 1


# Order, turns and limits ---------------------------------------------------------------------


@pytest.mark.usefixtures("no_delay")
def test_an_objects_events_wait_for_each_other_and_others_do_not(
    team: Team, actor: Actor, driver: str
) -> None:
    hook(actor, "http://127.0.0.1:9/")
    for object_id in ("sbx_1", "sbx_1", "sbx_2"):
        put(team, object_id)
    rows = list(Delivery.objects.order_by("id"))
    first = attempt(driver, BAD)
    assert [one.id for one in first] == [rows[0].pk, rows[2].pk]
    again = claims.claim(driver, 64)
    assert [(one.id, one.attempt) for one in again] == [(rows[0].pk, 2), (rows[2].pk, 2)]
    assert claims.claim(driver, 64) == []
    claims.conclude(again[0], GOOD)
    assert [one.id for one in claims.claim(driver, 64)] == [rows[1].pk]


def test_teams_take_turns_and_none_takes_all_room(
    team: Team, actor: Actor, other_team: Team, other_actor: Actor, driver: str
) -> None:
    for number in range(3):
        hook(actor, f"http://127.0.0.1:9/{number}")
    hook(other_actor, "http://127.0.0.1:9/other")
    for number in range(10):
        put(team, f"sbx_{number}")
    for number in range(2):
        put(other_team, f"sbx_o{number}")
    claimed = claims.claim(driver, 4)
    assert [one.url.rpartition("/")[2] == "other" for one in claimed].count(True) == 2
    claimed += claims.claim(driver, 64)
    mine = [one for one in claimed if one.url.rpartition("/")[2] != "other"]
    assert len(mine) == claims.PER_TEAM
    webhooks = [one.webhook_id for one in mine]
    assert max(webhooks.count(webhook) for webhook in webhooks) <= claims.PER_WEBHOOK


@pytest.mark.usefixtures("no_delay")
def test_a_failing_delivery_is_tried_four_times_under_one_id(
    actor: Actor, receiver: Receiver
) -> None:
    webhook, _ = hook(actor, receiver.url, "sandbox.created")
    receiver.answer = lambda _: 500
    box(actor)
    run_queue()
    assert len(receiver.got) == 4
    assert len({(got.delivery, got.body) for got in receiver.got}) == 1
    (delivery,) = services.list_deliveries(actor, webhook.pk)
    assert (delivery.status, delivery.attempts, delivery.response_status) == ("failed", 4, 500)
    webhook.refresh_from_db()
    assert (webhook.consecutive_failures, webhook.active) == (1, True)
    assert webhook.last_error == "It answered 500."


def test_the_next_attempt_is_ten_seconds_later(team: Team, driver: str) -> None:
    hook_row = Webhook.objects.create(team=team, url="http://127.0.0.1:9/")
    put(team)
    attempt(driver, BAD)
    row = hook_row.deliveries.get()
    assert row.attempted_at is not None
    assert (row.next_attempt_at - row.attempted_at).total_seconds() == 10
    assert claims.claim(driver, 64) == []


@pytest.mark.usefixtures("no_delay")
def test_twenty_failures_in_a_row_disable_it_and_enabling_starts_anew(
    team: Team, actor: Actor, driver: str
) -> None:
    webhook, _ = hook(actor, "http://127.0.0.1:9/")
    fail_deliveries(team, driver, 19)
    webhook.refresh_from_db()
    assert (webhook.active, webhook.consecutive_failures) == (True, 19)
    put(team, "sbx_waits")
    put(team, "sbx_waits")
    fail_deliveries(team, driver, 1)
    webhook.refresh_from_db()
    assert (webhook.active, webhook.consecutive_failures) == (False, 20)
    assert not Delivery.objects.filter(status="pending").exists()
    put(team)
    assert not Delivery.objects.filter(status="pending").exists()
    entry = AuditEntry.objects.get(action="webhook.disable")
    assert (entry.surface, entry.object_id) == ("system", webhook.pk)
    enabled = services.enable_webhook(actor, webhook.pk)
    assert (enabled.active, enabled.consecutive_failures, enabled.last_error) == (True, 0, "")


def fail_deliveries(team: Team, driver: str, count: int) -> None:
    for number in range(count):
        put(team, f"sbx_fails{number}")
        for _ in range(claims.ATTEMPTS):
            attempt(driver, BAD, 1)


@pytest.mark.usefixtures("no_delay")
def test_one_success_forgets_the_failures(team: Team, actor: Actor, driver: str) -> None:
    webhook, _ = hook(actor, "http://127.0.0.1:9/")
    fail_deliveries(team, driver, 3)
    put(team)
    attempt(driver, GOOD)
    webhook.refresh_from_db()
    assert (webhook.consecutive_failures, webhook.last_error) == (0, "")
    assert webhook.last_delivery_at is not None


def test_what_a_sender_that_is_gone_was_sending_is_sent_again(
    team: Team, actor: Actor, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driving, "ORPHAN_GRACE_SECONDS", 0.0)
    hook(actor, receiver.url)
    put(team)
    with driving.driving() as name:
        (lost,) = claims.claim(name, 64)
    OrmQ.objects.all().delete()
    settling.settle_orphans()
    run_queue()
    (got,) = receiver.got
    assert got.delivery == lost.delivery_id
    # Its late result changes nothing.
    claims.conclude(lost, BAD)
    assert Delivery.objects.get().status == "delivered"


def test_deliveries_of_a_deleted_webhook_are_gone(team: Team, actor: Actor, driver: str) -> None:
    webhook, _ = hook(actor, "http://127.0.0.1:9/")
    put(team)
    (claimed,) = claims.claim(driver, 64)
    services.delete_webhook(actor, webhook.pk)
    claims.conclude(claimed, GOOD)
    assert not Delivery.objects.exists()
    with pytest.raises(NotFound):
        services.get_webhook(actor, webhook.pk)


def test_what_waits_for_more_than_a_day_is_given_up(team: Team, actor: Actor) -> None:
    hook(actor, "http://127.0.0.1:9/")
    put(team)
    Delivery.objects.update(created_at="2026-01-01T00:00:00Z")
    claims.drop_overdue()
    assert Delivery.objects.get().error == claims.TOO_OLD


# Tests, plans, other teams -------------------------------------------------------------------


def test_a_test_is_sent_once_even_while_it_is_disabled(actor: Actor, receiver: Receiver) -> None:
    webhook, secret = hook(actor, receiver.url)
    Webhook.objects.update(active=False)
    receiver.answer = lambda _: 503
    first = services.send_test(actor, webhook.pk)
    assert services.send_test(actor, webhook.pk) == first
    run_queue()
    (got,) = receiver.got
    assert (got.event, got.delivery, got.object) == ("webhook.test", first.delivery_id, webhook.pk)
    assert got.is_signed_with(secret)
    webhook.refresh_from_db()
    assert (webhook.consecutive_failures, webhook.last_error) == (0, "")


def test_the_plan_limits_how_many_there_are(actor: Actor) -> None:
    Plan.objects.filter(pk="team").update(max_webhooks=1)
    hook(actor, "http://127.0.0.1:9/")
    with pytest.raises(PlanLimit, match="1 of the 1 webhooks"):
        hook(actor, "http://127.0.0.1:9/")
    assert services.usage_counts([actor.team])[actor.team.pk] == {"max_webhooks": 1}


def test_secrets_differ_and_are_stored_nowhere(actor: Actor) -> None:
    (one, secret), (_, other) = (hook(actor, "http://127.0.0.1:9/") for _ in range(2))
    assert secret != other
    assert secret == secret_of(one.pk)
    assert secret.startswith("whsec_")
    with connection.cursor() as cursor:
        for table in ("webhooks_webhook", "accounts_auditentry"):
            cursor.execute(f"SELECT count(*) FROM {table} t WHERE t::text LIKE '%%whsec%%'")
            assert cursor.fetchone() == (0,)


# Addresses -----------------------------------------------------------------------------------

PRIVATE = [
    "http://10.1.2.3/", "http://192.168.0.1/", "http://172.16.9.9:8080/", "http://169.254.169.254/",
    "http://100.64.0.1/", "http://168.63.129.16/", "http://0.0.0.0/", "http://[::1]/",
    "http://[fd00::1]/", "http://[fe80::1]/", "http://[::ffff:10.0.0.1]/",
    "http://[64:ff9b::a00:1]/", "http://127.0.0.1/", "https://localhost/",
]  # fmt: skip


@pytest.mark.parametrize("url", PRIVATE)
def test_private_addresses_are_refused(actor: Actor, settings: Settings, url: str) -> None:
    settings.WEBHOOK_DENIED, settings.WEBHOOK_PERMITTED = deny_list(), ()
    with pytest.raises(InvalidInput) as refused:
        hook(actor, url)
    assert "an address that is not public" in refused.value.detail
    assert list(refused.value.fields or {}) == ["url"]


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.org/", "example.org/hook", "http://", "https://user:pw@example.org/",
        "https://example.org/#part", "https://exa mple.org/", "https://example.org/\r\nX: y",
        "https://bücher.example/", "https://example.org:0/", "https://example.org:99999/",
        "http://2130706433/", "http://0x7f.1/", "http://[::1/", f"https://example.org/{'x' * 2048}",
    ],
)  # fmt: skip
def test_addresses_that_make_no_request_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="url"):
        WebhookSpec(url=url)


def test_a_name_that_changes_its_address_is_refused_when_it_is_sent(
    team: Team, actor: Actor, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is looked up once, and what was looked up is what is connected to."""
    port = parse_target(receiver.url).port
    looked_up: list[str] = []
    answers = iter(["127.0.0.1", "127.0.0.1", "10.0.0.1"])

    def resolver(host: str, port: int, **_: Any) -> list[Any]:
        looked_up.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

    monkeypatch.setattr("orkestr_console.webhooks.addresses.socket.getaddrinfo", resolver)
    hook(actor, f"http://hooks.example:{port}/hook")
    put(team, "sbx_1")
    run_queue()
    assert [got.headers["Host"] for got in receiver.got] == [f"hooks.example:{port}"]
    put(team, "sbx_2")
    monkeypatch.setattr(claims, "ATTEMPTS", 1)
    run_queue()
    assert (len(receiver.got), looked_up) == (1, ["hooks.example"] * 3)
    refused = Delivery.objects.get(object_id="sbx_2")
    assert (refused.status, refused.response_status) == ("failed", None)
    assert refused.error.startswith("It leads to an address that is not public")


def test_a_name_that_nobody_waits_for_any_more_is_not_looked_up(
    actor: Actor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or slow names would go on to take the place of everybody's."""
    begun, answered = threading.Semaphore(0), threading.Event()

    def resolver(*_: Any, **__: Any) -> list[Any]:
        begun.release()
        answered.wait(20)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 80))]

    monkeypatch.setattr("orkestr_console.webhooks.addresses.socket.getaddrinfo", resolver)
    monkeypatch.setattr(services, "RESOLVE_SECONDS", 0.1)
    with ThreadPoolExecutor(1) as resolvers:
        monkeypatch.setattr(services, "RESOLVERS", resolvers)
        for _ in range(5):
            with pytest.raises(InvalidInput, match="in time"):
                hook(actor, "http://slow.example/")
        answered.set()
    assert begun.acquire(blocking=False)
    assert not begun.acquire(blocking=False)


def test_a_teams_slow_names_leave_room_for_those_of_others(
    actor: Actor, other_team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = threading.Event()

    def resolver(host: str, *_: Any, **__: Any) -> list[Any]:
        if host == "slow.example":
            answered.wait(20)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 80))]

    monkeypatch.setattr("orkestr_console.webhooks.addresses.socket.getaddrinfo", resolver)
    monkeypatch.setattr(services, "RESOLVE_SECONDS", 0.1)
    with ThreadPoolExecutor(services.LOOKUPS_OF_TEAM + 1) as resolvers:
        monkeypatch.setattr(services, "RESOLVERS", resolvers)
        for _ in range(services.LOOKUPS_OF_TEAM):
            with pytest.raises(InvalidInput, match="in time"):
                hook(actor, "http://slow.example/")
        with pytest.raises(RateLimited, match="try again"):
            hook(actor, "http://slow.example/")
        monkeypatch.setattr(services, "RESOLVE_SECONDS", 20.0)
        hook(system_actor(other_team), "http://fast.example/")
        answered.set()
    assert not services.lookups.pending
    with ThreadPoolExecutor(1) as resolvers:
        monkeypatch.setattr(services, "RESOLVERS", resolvers)
        hook(actor, "http://slow.example/")


def test_a_name_with_one_private_address_is_refused_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80))
        for address in ("192.0.2.1", "10.0.0.1")
    ]
    monkeypatch.setattr(
        "orkestr_console.webhooks.addresses.socket.getaddrinfo", lambda *_, **__: found
    )
    with pytest.raises(UnreachableTarget, match="not public"):
        resolve(parse_target("http://hooks.example/"))


def test_the_servers_own_addresses_are_refused(settings: Settings) -> None:
    """Whatever they are: a public one leads to what listens on every address of this machine."""
    settings.WEBHOOK_DENIED, settings.WEBHOOK_PERMITTED = (), ()
    with pytest.raises(UnreachableTarget, match="this server itself"):
        resolve(parse_target("http://127.0.0.1:1/"))


# Receivers that misbehave --------------------------------------------------------------------


@pytest.mark.usefixtures("no_delay")
@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_are_not_followed(actor: Actor, receiver: Receiver, status: int) -> None:
    hook(actor, receiver.url, "sandbox.created")
    receiver.answer = lambda _: status
    box(actor)
    run_queue()
    assert {got.path for got in receiver.got} == {"/hook"}
    assert Delivery.objects.get().error == (f"It answered {status}; redirects are not followed.")


def endless(connection: socket.socket) -> None:
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 100 Continue\r\n")
    while True:
        connection.sendall(b"X-More: " + b"x" * 1000 + b"\r\n")


def one_line(connection: socket.socket) -> None:
    connection.recv(65536)
    while True:
        connection.sendall(b"x" * 65536)


def silent(connection: socket.socket) -> None:
    while connection.recv(65536):
        pass


def dripping(connection: socket.socket) -> None:
    connection.recv(65536)
    while True:
        connection.sendall(b"H")
        time.sleep(0.05)


def closing(connection: socket.socket) -> None:
    connection.recv(65536)


def long_body(connection: socket.socket) -> None:
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n")
    while True:
        connection.sendall(b"x" * 65536)


@pytest.mark.parametrize(
    ("script", "error"),
    [
        (endless, "It did not answer in HTTP/1.1."),
        (one_line, "It did not answer in HTTP/1.1."),
        (closing, "It did not answer in HTTP/1.1."),
        (silent, "It did not answer within"),
        (dripping, "It did not answer within"),
        (long_body, ""),
    ],
)
def test_a_receiver_costs_bounded_time_and_memory(
    actor: Actor, monkeypatch: pytest.MonkeyPatch, script: Any, error: str
) -> None:
    monkeypatch.setattr(posting, "TOTAL_SECONDS", 1.0)
    with talking(script) as url:
        webhook, _ = hook(actor, url)
        services.send_test(actor, webhook.pk)
        run_queue()
    delivery = Delivery.objects.get()
    assert delivery.error.startswith(error)
    assert bool(delivery.error) == bool(error)


def test_who_listens_nowhere_is_said(actor: Actor) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    webhook, _ = hook(actor, f"http://127.0.0.1:{port}/")
    services.send_test(actor, webhook.pk)
    run_queue()
    assert Delivery.objects.get().error.startswith("It cannot be reached: ")


def test_every_status_is_told_as_something() -> None:
    """A status that is added is a decision: the table of announcements has all of them."""
    assert set(TOLD_AS) == set(SandboxStatus)
