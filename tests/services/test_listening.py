"""What the host says of its sandboxes is in the rows at once, and costs next to nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from django.db import OperationalError, connection
from django.test.utils import CaptureQueriesContext

from hostruntime.errors import HostUnavailable
from orkestr_console.accounts.actor import Actor
from orkestr_console.installation.models import Installation
from sandboxes_app import services, tasks
from sandboxes_app.models import Sandbox, SandboxEvent
from sandboxes_app.services import lifecycle, listening
from sandboxes_app.services.listening import Listener
from sandboxes_app.specs import SandboxSpec
from tests.fakes.fixtures import queued, run_queue
from tests.fakes.host import FakeHost

pytestmark = pytest.mark.django_db

DEBIAN = SandboxSpec(template="debian-12")


@pytest.fixture(autouse=True)
def hold_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "LONG_POLL_SECONDS", 0.0)


@pytest.fixture
def sandbox(host: FakeHost, actor: Actor) -> Sandbox:
    return services.create_sandbox(actor, DEBIAN)


@pytest.fixture
def listener(host: FakeHost) -> Listener:
    """One that has compared everything, so that what it hears is all that it knows."""
    listener = Listener()
    listener.poll()
    return listener


def status(sandbox: Sandbox) -> str:
    sandbox.refresh_from_db()
    return sandbox.status


@pytest.mark.parametrize(
    ("reason", "after", "words"),
    [
        ("exited", "failed", "own processes ended it"),
        ("out_of_disk", "failed", "disk was running out"),
        ("host_lost", "failed", "host lost"),
        ("expired", "terminated", ""),
    ],
)
def test_what_ended_has_ended_as_soon_as_it_is_heard(
    host: FakeHost, sandbox: Sandbox, listener: Listener, reason: str, after: str, words: str
) -> None:
    host.end(sandbox.pk, reason)
    listener.poll()
    assert status(sandbox) == after
    assert words in sandbox.error_message
    assert sandbox.ended_at is not None
    last = SandboxEvent.objects.filter(sandbox=sandbox).last()
    assert last is not None
    assert (last.from_status, last.to_status) == ("running", after)
    run_queue()
    assert sandbox.pk not in host.booted


def test_a_sandbox_that_stands_still_or_runs_is_said_to(
    host: FakeHost, sandbox: Sandbox, listener: Listener
) -> None:
    for paused in (True, False):
        host._set_paused(sandbox.pk, None, paused=paused)
        listener.poll()
        assert status(sandbox) == ("paused" if paused else "running")


def test_what_a_pause_by_the_api_changes_is_heard_without_effect(
    host: FakeHost, sandbox: Sandbox, listener: Listener, actor: Actor
) -> None:
    services.pause_sandbox(actor, sandbox.pk)
    listener.poll()
    kinds = SandboxEvent.objects.filter(sandbox=sandbox).values_list("kind", flat=True)
    assert list(kinds) == ["created", "running", "pausing", "paused"]


def test_another_run_of_the_agent_is_compared_with_all_rows(
    host: FakeHost, sandbox: Sandbox, listener: Listener
) -> None:
    del host.booted[sandbox.pk]
    listener.poll()
    assert status(sandbox) == "running"
    host.run = "run-2"
    listener.poll()
    assert status(sandbox) == "failed"


def test_what_could_not_be_written_down_is_heard_again(
    host: FakeHost, sandbox: Sandbox, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OperationalError("the database is away")

    host.end(sandbox.pk, "exited")
    with monkeypatch.context() as patch:
        patch.setattr(lifecycle, "end_many", fail)
        with pytest.raises(OperationalError):
            listener.poll()
    listener.poll()
    assert status(sandbox) == "failed"


def test_nothing_is_believed_of_a_host_that_is_not_ours(
    host: FakeHost, sandbox: Sandbox, listener: Listener
) -> None:
    Installation.objects.update(mismatch="the state is of another database")
    host.end(sandbox.pk, "exited")
    listener.poll()
    assert status(sandbox) == "running"


def test_the_loop_outlives_a_host_and_a_database_that_are_away(
    host: FakeHost, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Enough(BaseException):
        pass

    class Unclosed:
        def close(self) -> None:
            pass

    faults: list[Any] = [HostUnavailable("away"), OperationalError("away"), ValueError("a defect")]
    hear = Listener.poll

    def hear_or_fail(self: Listener) -> None:
        if faults:
            raise faults.pop(0)
        hear(self)
        raise Enough

    monkeypatch.setattr(tasks, "RETRY_SECONDS", 0)
    monkeypatch.setattr(Listener, "poll", hear_or_fail)
    # Django's test case goes on with this connection.
    monkeypatch.setattr("sandboxes_app.tasks.connection", Unclosed())
    host.end(sandbox.pk, "exited")
    beats: list[None] = []
    with pytest.raises(Enough):
        tasks.listen(lambda: beats.append(None))
    assert status(sandbox) == "failed"
    assert len(beats) == 4


# What it costs ---------------------------------------------------------------------------------


def statements(action: Any) -> int:
    with CaptureQueriesContext(connection) as captured:
        action()
    return len(captured)


def many(host: FakeHost, sandbox: Sandbox, number: int) -> None:
    """So many more that run, in rows and on the host."""
    Sandbox.objects.bulk_create(
        Sandbox(
            team=sandbox.team,
            template="debian-12",
            template_name="debian-12",
            image_id="debian-12",
            network="off",
            size="small",
            cpu=1,
            memory_mb=1024,
            status="running",
            timeout_seconds=300,
            region="local",
            node_id="here",
            expires_at=sandbox.expires_at,
        )
        for _ in range(number)
    )
    box = host.booted[sandbox.pk]
    for one in Sandbox.objects.all():
        host.booted[one.pk] = replace(box, info=replace(box.info, id=one.pk))


def test_an_idle_installation_is_asked_for_little(
    host: FakeHost, sandbox: Sandbox, listener: Listener
) -> None:
    assert statements(listener.poll) == 1
    many(host, sandbox, 1000)
    assert statements(listener.poll) == 1


def test_rounds_are_few_and_all_is_settled_within_ten_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    assert 60 / listening.LONG_POLL_SECONDS <= 8
    assert listening.LONG_POLL_SECONDS + 2.0 <= 10


def test_to_compare_all_takes_as_many_statements_for_a_thousand(
    host: FakeHost, sandbox: Sandbox, listener: Listener
) -> None:
    few = statements(lifecycle.reconcile)
    many(host, sandbox, 1000)
    assert statements(lifecycle.reconcile) == few
    assert set(Sandbox.objects.values_list("status", flat=True)) == {"running"}


def test_to_end_a_thousand_takes_as_many_statements_as_one(
    host: FakeHost, sandbox: Sandbox, listener: Listener
) -> None:
    many(host, sandbox, 1)
    host.end(sandbox.pk, "exited")
    one = statements(listener.poll)
    many(host, sandbox, 1000)
    for key in host.booted:
        host.end(key, "exited")
    assert statements(listener.poll) <= one + 2
    assert set(Sandbox.objects.values_list("status", flat=True)) == {"failed"}
    assert queued().count("sandboxes_app.tasks.release_sandboxes") == 3
    assert SandboxEvent.objects.filter(kind="failed").count() == 1002
