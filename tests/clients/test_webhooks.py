"""Webhooks with the official SDK, unmodified, and a receiver on this machine."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from orkestr import OrkestrClient, Sandbox, Webhook
from orkestr.errors import APIError, SandboxNotFound

from tests.clients.making import Sandboxes, Templates
from tests.receiving import Receiver, receiving
from tests.stack import Stack, wait_for


@pytest.fixture
def receiver(sdk: OrkestrClient) -> Iterator[Receiver]:
    """A receiver; afterwards, there is no webhook any more."""
    with receiving() as receiver:
        try:
            yield receiver
        finally:
            for webhook in Webhook.list(client=sdk):
                Webhook.delete(webhook.id, client=sdk)


def test_a_sandboxs_whole_life_is_told_and_signed(
    sdk: OrkestrClient, sandboxes: Sandboxes, receiver: Receiver
) -> None:
    webhook = Webhook.create(receiver.url, client=sdk)
    assert (webhook.url, webhook.event_types, webhook.active) == (receiver.url, None, True)
    assert (webhook.consecutive_failures, webhook.last_error) == (0, None)
    assert webhook.id.startswith("whk_")
    assert webhook.secret is not None
    assert webhook.secret.startswith("whsec_")
    sandbox = sandboxes.boot("debian-12", metadata={"job": "nightly"})
    sandbox.pause()
    Sandbox.resume(sandbox.id, client=sdk)
    sandbox.terminate()
    told = receiver.wait_for(4)
    assert [got.event for got in told] == [
        f"sandbox.{word}" for word in ("created", "paused", "resumed", "terminated")
    ]
    assert {got.object for got in told} == {sandbox.id}
    assert told[0].json["data"]["metadata"] == {"job": "nightly"}
    assert all(got.is_signed_with(webhook.secret) for got in told)
    assert len({got.delivery for got in told}) == 4
    (listed,) = Webhook.list(client=sdk)
    assert (listed.id, listed.secret, listed.consecutive_failures) == (webhook.id, None, 0)
    wait_for(lambda: Webhook.list(client=sdk)[0].last_delivery_at is not None, 10)


def test_a_finished_build_is_told(
    sdk: OrkestrClient, templates: Templates, receiver: Receiver
) -> None:
    webhook = Webhook.create(receiver.url, event_types=["template.build_finished"], client=sdk)
    assert webhook.event_types == ["template.build_finished"]
    good, bad = templates.create("debian-12", "true"), templates.create("debian-12", "false")
    told = {got.object: got.json["data"] for got in receiver.wait_for(2)}
    assert told[good]["status"] == "ready"
    assert told[bad]["status"] == "failed"
    assert told[bad]["error_message"]


def test_one_is_disabled_enabled_and_deleted(
    stack: Stack, sdk: OrkestrClient, receiver: Receiver
) -> None:
    webhook = Webhook.create(receiver.url, client=sdk)
    enabled = Webhook.enable(webhook.id, client=sdk)
    assert (enabled.id, enabled.active, enabled.secret) == (webhook.id, True, None)
    with stack.client() as client:
        sent = client.post(f"/v1/sandboxes/webhooks/{webhook.id}/test")
        assert (sent.status_code, sent.json()["event"]) == (202, "webhook.test")
        (got,) = receiver.wait_for(1)
        assert got.delivery == sent.json()["id"]
        deliveries = f"/v1/sandboxes/webhooks/{webhook.id}/deliveries"
        wait_for(
            lambda: client.get(deliveries).json()["deliveries"][0]["status"] == "delivered", 10
        )
    Webhook.delete(webhook.id, client=sdk)
    assert Webhook.list(client=sdk) == []
    with pytest.raises(SandboxNotFound):
        Webhook.delete(webhook.id, client=sdk)


@pytest.mark.parametrize(
    "url", ["http://169.254.169.254/latest/", "http://10.0.0.1/", "http://[::1]/", "ftp://x.org/"]
)
def test_addresses_inside_are_refused(sdk: OrkestrClient, url: str) -> None:
    with pytest.raises(APIError) as refused:
        Webhook.create(url, client=sdk)
    assert refused.value.status_code == 400
    assert Webhook.list(client=sdk) == []


def test_what_a_killed_worker_was_sending_is_sent_again(
    stack: Stack, sdk: OrkestrClient, sandboxes: Sandboxes, receiver: Receiver
) -> None:
    """Every process of the worker is killed while a receiver holds an answer back."""
    Webhook.create(receiver.url, event_types=["sandbox.terminated"], client=sdk)
    sandbox = sandboxes.boot("debian-12")
    old = stack.pid("worker")
    killed: list[int] = []

    def kill_then_answer(_: object) -> int:
        if not killed:
            killed.extend(descendants(old))
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
        return 204

    receiver.answer = kill_then_answer
    sandbox.terminate()
    first, second = receiver.wait_for(2, 60)[:2]
    assert (first.delivery, first.body) == (second.delivery, second.body)
    assert second.object == sandbox.id


def descendants(pid: int) -> list[int]:
    """A process and all below it (proc(5)); the watchdog first, so that it replaces nobody."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(found for child in children for found in descendants(int(child)))]
