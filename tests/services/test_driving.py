"""What is on its way is judged by whether its driver lives, however long it takes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from django.db import connection
from django.utils import timezone

from orkestr_console.accounts.actor import Actor, system_actor
from orkestr_console.accounts.models import Team
from sandboxes_app import services, tasks
from sandboxes_app.models import Sandbox, SandboxEvent, Snapshot
from sandboxes_app.services import driving
from sandboxes_app.specs import SandboxSpec, SnapshotSpec
from tests.fakes.host import FakeHost

pytestmark = pytest.mark.django_db(transaction=True)

HOURS = 10 * driving.SILENCE


@pytest.fixture(autouse=True)
def quick_heart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driving, "HEARTBEAT_SECONDS", 0.05)


@pytest.fixture
def team_actor(plans: None, team: Team) -> Actor:
    return system_actor(team)


class SlowCall:
    """A call of the host's that takes until it is let go on."""

    def __init__(self, host: FakeHost, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        whole: Callable[..., Any] = getattr(host, name)

        def slow(*words: Any, **options: Any) -> Any:
            self.begun.set()
            assert self.go_on.wait(60)
            return whole(*words, **options)

        monkeypatch.setattr(host, name, slow)


class Meanwhile:
    """Something that another thread of the web process does."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self.answer: Any = None
        self.thread = threading.Thread(target=self._run, args=(action,))
        self.thread.start()

    def _run(self, action: Callable[[], Any]) -> None:
        try:
            self.answer = action()
        except Exception as error:  # noqa: BLE001 - the test looks at it
            self.answer = error
        finally:
            connection.close()

    def end(self) -> Any:
        self.thread.join(60)
        assert not self.thread.is_alive()
        return self.answer


def grow_old() -> None:
    """Everything there is was begun long ago."""
    then = timezone.now() - HOURS
    Sandbox.objects.update(created_at=then)
    Snapshot.objects.update(created_at=then)
    SandboxEvent.objects.update(at=then)


def driven(row: Sandbox | Snapshot) -> bool:
    row.refresh_from_db()
    return bool(row.driven_at and row.driven_at > timezone.now() - timedelta(seconds=5))


def until(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(1_000):
        if condition():
            return
        pause.wait(0.02)
    raise AssertionError("it never happened")


@pytest.fixture
def slow(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], SlowCall]]:
    calls: list[SlowCall] = []

    def make(name: str) -> SlowCall:
        calls.append(SlowCall(host, name, monkeypatch))
        return calls[-1]

    yield make
    for call in calls:
        call.go_on.set()


def test_a_start_that_takes_hours_is_not_lost(
    host: FakeHost, team_actor: Actor, slow: Callable[[str], SlowCall]
) -> None:
    call = slow("create_sandbox")
    spec = SandboxSpec(template="debian-12", timeout_seconds=3600)
    creating = Meanwhile(lambda: services.create_sandbox(team_actor, spec))
    assert call.begun.wait(60)
    row = Sandbox.objects.get()
    grow_old()
    until(lambda: driven(row))
    tasks.tidy()
    row.refresh_from_db()
    assert row.status == "starting"
    call.go_on.set()
    assert creating.end().status == "running"
    row.refresh_from_db()
    assert row.status == "running"
    assert set(host.booted) == {row.pk}


def test_a_capture_that_takes_hours_is_not_lost(
    host: FakeHost, team_actor: Actor, slow: Callable[[str], SlowCall]
) -> None:
    sandbox = services.create_sandbox(team_actor, SandboxSpec(template="debian-12"))
    call = slow("create_snapshot")
    taking = Meanwhile(
        lambda: services.create_snapshot(team_actor, sandbox.pk, SnapshotSpec(name="large"))
    )
    assert call.begun.wait(60)
    row = Snapshot.objects.get()
    grow_old()
    until(lambda: driven(row))
    tasks.tidy()
    row.refresh_from_db()
    assert row.status == "capturing"
    call.go_on.set()
    assert taking.end().status == "ready"


@pytest.mark.parametrize(
    ("verb", "before", "during", "after"),
    [("pause", "running", "pausing", "paused"), ("resume", "paused", "resuming", "running")],
)
def test_to_pause_and_to_resume_may_take_hours(
    host: FakeHost,
    team_actor: Actor,
    slow: Callable[[str], SlowCall],
    verb: str,
    before: str,
    during: str,
    after: str,
) -> None:
    sandbox = services.create_sandbox(team_actor, SandboxSpec(template="debian-12"))
    if before == "paused":
        services.pause_sandbox(team_actor, sandbox.pk)
    call = slow(f"{verb}_sandbox")
    action = getattr(services, f"{verb}_sandbox")
    changing = Meanwhile(lambda: action(team_actor, sandbox.pk))
    assert call.begun.wait(60)
    grow_old()
    until(lambda: driven(sandbox))
    tasks.tidy()
    sandbox.refresh_from_db()
    assert sandbox.status == during
    call.go_on.set()
    assert changing.end().status == after


def test_what_a_killed_process_left_is_settled(host: FakeHost, team_actor: Actor) -> None:
    spec = SandboxSpec(template="debian-12", timeout_seconds=3600)
    boxes = [services.create_sandbox(team_actor, spec) for _ in range(3)]
    snapshots = [services.create_snapshot(team_actor, boxes[2].pk, SnapshotSpec())]
    Sandbox.objects.filter(pk__in=[boxes[0].pk, boxes[1].pk]).update(status="starting")
    Snapshot.objects.update(status="capturing")
    grow_old()
    quiet, fresh = timezone.now() - 2 * driving.SILENCE, timezone.now() - driving.SILENCE / 2
    Sandbox.objects.filter(pk=boxes[0].pk).update(driven_at=quiet)
    Sandbox.objects.filter(pk=boxes[1].pk).update(driven_at=fresh)
    Snapshot.objects.update(driven_at=quiet)
    tasks.tidy()
    statuses = dict(Sandbox.objects.values_list("pk", "status"))
    assert statuses == {boxes[0].pk: "failed", boxes[1].pk: "starting", boxes[2].pk: "running"}
    assert Snapshot.objects.get(pk=snapshots[0].pk).status == "failed"


def test_a_process_that_drives_nothing_says_nothing(host: FakeHost, team_actor: Actor) -> None:
    sandbox = services.create_sandbox(team_actor, SandboxSpec(template="debian-12"))
    until(lambda: not any(thread.name == "drivers" for thread in threading.enumerate()))
    sandbox.refresh_from_db()
    assert sandbox.driven_at is None
