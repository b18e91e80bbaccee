"""The sender in real workers that are really killed: nothing is lost, and order is kept."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.db import connection, transaction
from django_q.tasks import async_task

from orkestr_console.accounts.actor import Actor
from orkestr_console.accounts.models import Team
from orkestr_console.webhooks import claims, outbox, services
from orkestr_console.webhooks.models import Delivery, EventType, Webhook
from orkestr_console.webhooks.signing import secret_of
from tests.receiving import Got, Receiver
from tests.receiving import receiver as receiver
from tests.services.test_worker import NOTE, Journal, Worker, alive, wait_for

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.usefixtures("plans"),
    pytest.mark.timeout(200),
]
OBJECTS, EACH = 8, 6


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    monkeypatch.setenv("ORKESTR_WEBHOOK_PERMIT", "127.0.0.0/8")
    monkeypatch.setenv("ORKESTR_TOKEN_PEPPER", settings.TOKEN_PEPPER)
    worker = Worker(tmp_path)
    try:
        worker.wait_until_ready()
        yield worker
    finally:
        members = worker.members()
        worker.process.kill()
        worker.process.wait()
        wait_for(lambda: not any(alive(pid) for pid in members))


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal")


def put(team: Team, object_id: str, number: int) -> None:
    with transaction.atomic():
        data = {"sandbox_id": object_id, "number": number}
        outbox.put(team.pk, EventType.SANDBOX_PAUSED, object_id, data)


def test_kills_lose_nothing_and_keep_every_objects_order(
    worker: Worker, team: Team, receiver: Receiver
) -> None:
    webhook = Webhook.objects.create(team=team, url=receiver.url)

    def slowly(_: Got) -> int:
        time.sleep(0.05)
        return 204

    receiver.answer = slowly
    for number in range(EACH):
        for index in range(OBJECTS):
            put(team, f"sbx_{index}", number)
        time.sleep(0.2)
        os.kill(random.choice(worker.workers()), signal.SIGKILL)
    # Without a host there is no listener; the next event's task has somebody look as well.
    put(team, "sbx_last", 0)
    wait_for(lambda: not Delivery.objects.exclude(status="delivered").exists(), 60)
    numbers: dict[str, list[int]] = defaultdict(list)
    ids: dict[tuple[str, int], set[str]] = defaultdict(set)
    for got in receiver.got:
        number = got.json["data"]["number"]
        ids[got.object, number].add(got.delivery)
        if number not in numbers[got.object]:
            numbers[got.object].append(number)
    assert numbers.pop("sbx_last") == [0]
    assert dict(numbers) == {f"sbx_{index}": list(range(EACH)) for index in range(OBJECTS)}
    assert {len(one) for one in ids.values()} == {1}
    assert all(got.is_signed_with(secret_of(webhook.pk)) for got in receiver.got)


def test_a_change_meanwhile_survives_the_deletion_of_a_webhook(team: Team) -> None:
    """It waits for the deletion, and then has nobody to tell."""
    webhook = Webhook.objects.create(team=team, url="http://127.0.0.1:9/")
    told: list[str] = []

    def change() -> None:
        put(team, "sbx_1", 0)
        told.append("done")
        connection.close()

    with transaction.atomic():
        webhook.delete()
        changing = threading.Thread(target=change)
        changing.start()
        wait_for(lambda: waiting_for_locks() == 1)
    changing.join()
    assert (told, Delivery.objects.count()) == (["done"], 0)


def test_what_happens_while_a_webhook_is_deleted_does_not_keep_it(team: Team, actor: Actor) -> None:
    """Its deliveries are deleted first, which takes long if there are many."""
    webhook = Webhook.objects.create(team=team, url="http://127.0.0.1:9/")
    told: list[str] = []

    def change() -> None:
        put(team, "sbx_1", 0)
        told.append("done")
        connection.close()

    def slowly(execute: Any, sql: str, *rest: Any) -> Any:
        if sql.startswith(f'DELETE FROM "{Webhook._meta.db_table}"'):
            changing.start()
            wait_for(lambda: told == ["done"] or waiting_for_locks() == 1)
        return execute(sql, *rest)

    changing = threading.Thread(target=change)
    with connection.execute_wrapper(slowly):
        services.delete_webhook(actor, webhook.pk)
    changing.join()
    assert (told, Delivery.objects.count(), Webhook.objects.count()) == (["done"], 0, 0)


def test_who_claims_deliveries_waits_for_none(team: Team) -> None:
    """Whoever gives up or deletes many has them locked in another order: neither would go on."""
    Webhook.objects.create(team=team, url="http://127.0.0.1:9/")
    put(team, "sbx_1", 0)
    put(team, "sbx_2", 0)
    claimed: list[str] = []

    def claim() -> None:
        bodies = [one.body for one in claims.claim("drv_1", 64)]
        claimed.extend(json.loads(body)["data"]["sandbox_id"] for body in bodies)
        connection.close()

    with transaction.atomic():
        Delivery.objects.select_for_update().get(object_id="sbx_1")
        claiming = threading.Thread(target=claim)
        claiming.start()
        wait_for(lambda: bool(claimed) or waiting_for_locks() == 1)
    claiming.join()
    assert claimed == ["sbx_2"]


def waiting_for_locks() -> int:
    with connection.cursor() as cursor:
        # Within a transaction, it would have only those that it has seen before.
        cursor.execute("SELECT pg_stat_clear_snapshot()")
        cursor.execute(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE wait_event_type = 'Lock' AND datname = current_database()"
        )
        (waiting,) = cursor.fetchone()
    return int(waiting)


def test_a_slow_receiver_holds_up_neither_other_teams_nor_tasks(
    worker: Worker, team: Team, other_team: Team, receiver: Receiver, journal: Journal
) -> None:
    """Of a team whose receiver answers nothing, as much as possible is under way all the time."""
    answering = [False]

    def answer(got: Got) -> int:
        while got.path == "/hook/slow" and not answering[0]:
            time.sleep(0.05)
        return 204

    receiver.answer = answer
    Webhook.objects.create(team=team, url=f"{receiver.url}/slow")
    Webhook.objects.create(team=other_team, url=receiver.url)
    try:
        for index in range(40):
            put(team, f"sbx_{index}", 0)
        wait_for(lambda: Delivery.objects.exclude(driver="").exists())
        put(other_team, "sbx_other", 0)
        async_task(NOTE, str(journal.path), "task", 0.0)
        wait_for(lambda: bool(receiver.got and journal.pids("end", "task")))
        assert [got.object for got in receiver.got] == ["sbx_other"]
        assert Delivery.objects.filter(webhook__team=team, attempts__gt=1).count() == 0
    finally:
        answering[0] = True
