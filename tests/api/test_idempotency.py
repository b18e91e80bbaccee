"""``Idempotency-Key``: what is sent twice is made once, and its answer is the same."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
from django.db import connection
from django.test import Client

from orkestr_console.accounts.models import ApiToken, KeyedCall, Plan, Team
from orkestr_console.http import idempotency
from orkestr_console.queue.driving import driving
from orkestr_console.webhooks.models import Webhook
from sandboxes_app.models import Sandbox
from templates_app.models import Template
from tests.api.asking import refusal
from tests.conftest import MakeKey, api_client
from tests.fakes.host import FakeHost
from tests.receiving import loopback_permitted as loopback_permitted
from tests.services.test_webhooks_killed import waiting_for_locks
from tests.stack import wait_for

pytestmark = pytest.mark.usefixtures("host", "loopback_permitted")
TEMPLATE = {"name": "tools", "base_template": "debian-12", "recipe": ["true"]}
BOX = {"template": "debian-12"}
HOOK = {"url": "http://127.0.0.1:9/"}


def send(api: Client, path: str, body: dict[str, Any], key: str = "k1") -> Any:
    headers = {"Idempotency-Key": key}
    return api.post(path, body, content_type="application/json", headers=headers)


@pytest.mark.parametrize(
    ("path", "body", "model"),
    [
        ("/v1/templates", TEMPLATE, Template),
        ("/v1/sandboxes", BOX, Sandbox),
        ("/v1/sandboxes/webhooks", HOOK, Webhook),
    ],
)
def test_a_repeated_call_gets_the_first_answer(
    api: Client, path: str, body: dict[str, Any], model: Any
) -> None:
    first, again = send(api, path, body), send(api, path, body)
    assert first.status_code == again.status_code == 201
    assert first.json() == again.json()
    assert (first.headers.get("Idempotent-Replayed"), again.headers["Idempotent-Replayed"]) == (
        None,
        "true",
    )
    assert again.headers["Content-Type"] == "application/json"
    assert model.objects.count() == 1
    assert send(api, path, body, "k2").json()["id"] != first.json()["id"]


def test_a_secret_in_an_answer_is_kept_encrypted(api: Client) -> None:
    secret = send(api, "/v1/sandboxes/webhooks", HOOK).json()["secret"]
    assert secret.encode() not in bytes(KeyedCall.objects.get().answer)


def test_another_call_with_the_same_key_is_refused(api: Client) -> None:
    send(api, "/v1/templates", TEMPLATE)
    refusal(send(api, "/v1/templates", {**TEMPLATE, "name": "x"}), 400, "idempotency_key_reused")
    refusal(send(api, "/v1/sandboxes", BOX), 400, "idempotency_key_reused")
    assert Template.objects.count() == 1


def test_a_refused_call_keeps_nothing(api: Client) -> None:
    refusal(send(api, "/v1/templates", {"name": ""}), 400, "invalid_request")
    assert not KeyedCall.objects.exists()
    assert send(api, "/v1/templates", TEMPLATE).status_code == 201


def test_keys_are_their_tokens(
    api: Client, other_api: Client, team: Team, make_key: MakeKey
) -> None:
    ids = {
        send(client, "/v1/templates", TEMPLATE).json()["id"]
        for client in (api, other_api, api_client(make_key(team)))
    }
    assert len(ids) == 3


def test_without_a_good_token_nothing_is_kept(anonymous_api: Client, read_only_api: Client) -> None:
    refusal(send(anonymous_api, "/v1/templates", TEMPLATE), 401, "unauthenticated")
    refusal(send(read_only_api, "/v1/templates", TEMPLATE), 403, "insufficient_scope")
    assert not KeyedCall.objects.exists()


@pytest.mark.parametrize("key", ["", "a b", "x" * 256])
def test_a_key_that_is_none_is_refused(api: Client, key: str) -> None:
    refusal(send(api, "/v1/templates", TEMPLATE, key), 400, "invalid_request")


def test_answers_are_kept_for_a_day(api: Client) -> None:
    send(api, "/v1/templates", TEMPLATE)
    KeyedCall.objects.update(created_at="2026-01-01T00:00:00Z")
    assert "Idempotent-Replayed" not in send(api, "/v1/templates", TEMPLATE).headers


def test_a_call_whose_process_was_killed_is_made_again(api: Client) -> None:
    """Its driver's lock is gone, and there is no answer."""
    send(api, "/v1/templates", TEMPLATE)
    KeyedCall.objects.update(status=None, driver="drv_gone")
    assert "Idempotent-Replayed" not in send(api, "/v1/templates", TEMPLATE).headers
    assert KeyedCall.objects.get().status == 201


@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("plans")
def test_after_a_restart_of_postgresql_the_first_call_has_its_key_still(
    api: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lock is lost then, and taken again in a moment."""
    send(api, "/v1/templates", TEMPLATE)
    with ExitStack() as first:
        KeyedCall.objects.update(status=None, driver="drv_first")
        again = lambda _: first.enter_context(driving("drv_first"))  # noqa: E731
        monkeypatch.setattr(idempotency, "time", SimpleNamespace(sleep=again))
        refusal(send(api, "/v1/templates", TEMPLATE), 409, "idempotency_key_in_use")
    assert Template.objects.count() == 1


def test_a_call_with_a_key_is_one_call(api: Client) -> None:
    """Of those that its token can make in a minute."""
    Plan.objects.update(api_requests_per_minute=5)
    answers = [send(api, "/v1/templates", TEMPLATE, f"k{number}") for number in range(5)]
    assert [answer.status_code for answer in answers] == [201] * 5


def test_calls_without_a_key_cost_nothing_more(api: Client) -> None:
    api.post("/v1/templates", TEMPLATE, content_type="application/json")
    assert not KeyedCall.objects.exists()


@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("plans")
def test_one_is_made_while_another_asks(api: Client, host: FakeHost) -> None:
    answers: list[int] = []
    asked = threading.Event()

    def again() -> None:
        answers.append(send(api, "/v1/sandboxes", BOX).status_code)
        asked.set()
        connection.close()

    create = host.create_sandbox

    def slowly(spec: Any) -> Any:
        if not answers:
            threading.Thread(target=again).start()
            assert asked.wait(30)
        return create(spec)

    host.create_sandbox = slowly  # type: ignore[assignment,method-assign]
    assert send(api, "/v1/sandboxes", BOX).status_code == 201
    assert answers == [409]
    assert Sandbox.objects.count() == 1


@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("plans")
def test_a_call_sent_again_while_the_first_is_refused_is_made(
    team: Team, make_key: MakeKey
) -> None:
    """What the first leaves is forgotten between two statements of the second, or after both."""
    make_key(team)
    token = ApiToken.objects.get()
    idempotency.claim(token.pk, "k1", "same", "drv_first")
    forgotten: list[str] = []

    def forget() -> None:
        KeyedCall.objects.filter(driver="drv_first").delete()
        forgotten.append("done")
        connection.close()

    def slowly(execute: Any, sql: str, *rest: Any) -> Any:
        if sql.endswith("FOR UPDATE"):
            first.start()
            wait_for(lambda: forgotten == ["done"] or waiting_for_locks() == 1, 20)
        return execute(sql, *rest)

    first = threading.Thread(target=forget)
    with connection.execute_wrapper(slowly):
        second = idempotency.claim(token.pk, "k1", "same", "drv_second", gone="drv_first")
    assert second.status is None
    first.join()
    assert KeyedCall.objects.get().driver == "drv_second"


def test_only_creates_take_keys() -> None:
    taken = idempotency.CREATES.fullmatch
    assert taken("/v1/sandboxes/sbx_1/snapshots")
    assert not taken("/v1/sandboxes/sbx_1/exec")
    assert not taken("/v1/templates/tmpl_1")
