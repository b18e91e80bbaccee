"""What is on its way is judged by whether its driver lives, however long it takes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psycopg
import pytest
from django.db import connection
from django.utils import timezone
from django_q.models import OrmQ

from hostruntime.errors import HostUnavailable
from orkestr_console.accounts.actor import Actor, system_actor
from orkestr_console.accounts.models import Team
from orkestr_console.core.errors import HostUnavailable as Away
from orkestr_console.installation.models import Installation
from orkestr_console.queue import driving as driving_module
from orkestr_console.queue.driving import Drivers, IsDriven, driving, sharing
from sandboxes_app import services, tasks
from sandboxes_app.models import Sandbox, SandboxEvent, Snapshot
from sandboxes_app.services import lifecycle, settling
from sandboxes_app.specs import SandboxSpec, SnapshotSpec
from templates_app import services as templates
from templates_app.models import Template
from templates_app.specs import TemplateSpec
from tests.fakes.fixtures import queued, run_queue
from tests.fakes.host import FakeHost

pytestmark = pytest.mark.django_db(transaction=True)

DEBIAN = SandboxSpec(template="debian-12")
NOBODY = "drv_of_a_process_that_was_killed"


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


# Drivers that are shared -------------------------------------------------------------------------


@pytest.fixture
def lingering(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Drivers stay for the next piece of work; the statements that they take."""
    taken: list[str] = []
    drivers = driving_module._drivers
    execute = psycopg.Connection.execute

    def counting(session: Any, statement: Any, *words: Any, **options: Any) -> Any:
        if session.info.get_parameters().get("application_name") == "orkestr drivers":
            taken.append(statement)
        return execute(session, statement, *words, **options)

    monkeypatch.setattr(psycopg.Connection, "execute", counting)
    monkeypatch.setattr(driving_module, "LINGER_SECONDS", 60.0)
    yield taken
    with drivers._guard:
        drivers._release_shared()
        drivers._disconnect()


def test_pieces_of_work_take_one_lock_together(
    host: FakeHost, team_actor: Actor, lingering: list[str]
) -> None:
    for _ in range(5):
        sandbox = services.create_sandbox(team_actor, DEBIAN)
        services.terminate_sandbox(team_actor, sandbox.pk)
    # One to create and one to end: they may meet at one row.
    assert len(lingering) == 2, lingering


def test_one_that_fails_takes_its_driver_along(
    host: FakeHost, team_actor: Actor, lingering: list[str]
) -> None:
    services.create_sandbox(team_actor, DEBIAN)
    with sharing("start") as first, sharing("start") as second:
        assert first == second
        with pytest.raises(ZeroDivisionError), sharing("start") as third:
            assert third == first
            raise ZeroDivisionError
        # The others of that driver still have it, and nobody else gets it.
        assert is_driven(first)
        with sharing("start") as fourth:
            assert fourth != first
    assert (is_driven(first), is_driven(fourth)) == (False, True)


def test_a_start_that_failed_is_an_orphan_although_others_start(
    host: FakeHost, team_actor: Actor, lingering: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(host, "create_sandbox", fail)
        services.create_sandbox(team_actor, DEBIAN)
    row = Sandbox.objects.get()
    services.create_sandbox(team_actor, DEBIAN)
    assert row.status == "starting"
    settling.settle_orphans()
    row.refresh_from_db()
    assert row.status == "failed"


# Drivers that live -----------------------------------------------------------------------------


def test_a_start_that_takes_hours_is_not_lost(
    host: FakeHost, team_actor: Actor, slow: Callable[[str], SlowCall]
) -> None:
    call = slow("create_sandbox")
    creating = Meanwhile(lambda: services.create_sandbox(team_actor, DEBIAN))
    assert call.begun.wait(60)
    tasks.tidy()
    row = Sandbox.objects.get()
    assert row.status == "starting"
    call.go_on.set()
    assert creating.end().status == "running"
    row.refresh_from_db()
    assert (row.status, row.driver) == ("running", "")
    assert set(host.booted) == {row.pk}


def test_a_capture_that_takes_hours_is_not_lost(
    host: FakeHost, team_actor: Actor, slow: Callable[[str], SlowCall]
) -> None:
    sandbox = services.create_sandbox(team_actor, DEBIAN)
    call = slow("create_snapshot")
    taking = Meanwhile(
        lambda: services.create_snapshot(team_actor, sandbox.pk, SnapshotSpec(name="large"))
    )
    assert call.begun.wait(60)
    tasks.tidy()
    assert Snapshot.objects.get().status == "capturing"
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
    sandbox = services.create_sandbox(team_actor, DEBIAN)
    if before == "paused":
        services.pause_sandbox(team_actor, sandbox.pk)
    call = slow(f"{verb}_sandbox")
    action = getattr(services, f"{verb}_sandbox")
    changing = Meanwhile(lambda: action(team_actor, sandbox.pk))
    assert call.begun.wait(60)
    tasks.tidy()
    sandbox.refresh_from_db()
    assert sandbox.status == during
    call.go_on.set()
    assert changing.end().status == after


def is_driven(driver: str) -> bool:
    Sandbox.objects.update(driver=driver)
    return Sandbox.objects.filter(IsDriven("driver")).exists()


def test_a_driver_is_at_it_for_as_long_as_it_is(host: FakeHost, team_actor: Actor) -> None:
    services.create_sandbox(team_actor, DEBIAN)
    with driving() as one:
        with driving() as other:
            assert (is_driven(one), is_driven(other), is_driven(NOBODY)) == (True, True, False)
        assert (is_driven(one), is_driven(other)) == (True, False)
    assert not is_driven(one)
    with pytest.raises(ZeroDivisionError), driving() as one:
        raise ZeroDivisionError
    assert not is_driven(one)


def test_a_driver_whose_connection_was_lost_is_at_it_again(
    host: FakeHost, team_actor: Actor
) -> None:
    """As it is when PostgreSQL restarts."""
    services.create_sandbox(team_actor, DEBIAN)
    drivers = Drivers()
    with drivers.driving() as one, drivers.driving() as other:
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
                " WHERE application_name = 'orkestr drivers'"
            )
        until(lambda: is_driven(one))
        assert is_driven(other)
        with drivers.driving() as third:
            assert is_driven(third)
    assert not is_driven(one)


# Drivers that are gone -------------------------------------------------------------------------


@pytest.fixture
def sandbox(host: FakeHost, team_actor: Actor) -> Sandbox:
    return services.create_sandbox(team_actor, DEBIAN)


def left(sandbox: Sandbox, status: str) -> str:
    """What becomes of a sandbox that a killed process left so."""
    Sandbox.objects.filter(pk=sandbox.pk).update(status=status, driver=NOBODY)
    settling.settle_orphans()
    sandbox.refresh_from_db()
    assert sandbox.status not in {"starting", "pausing", "resuming"}
    assert sandbox.driver == ""
    return sandbox.status


def test_of_a_start_that_was_cut_off_nothing_is_left(host: FakeHost, sandbox: Sandbox) -> None:
    assert left(sandbox, "starting") == "failed"
    assert "stopped while" in sandbox.error_message
    run_queue()
    assert host.booted == {}


@pytest.fixture
def killed(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is killed as it asks the host to free a container."""

    class Killed(BaseException):
        pass

    free = host.delete_sandbox

    def ask(sandbox_id: str, collected: Sequence[str] = ()) -> None:
        monkeypatch.setattr(host, "delete_sandbox", free)
        raise Killed(sandbox_id)

    monkeypatch.setattr(host, "delete_sandbox", ask)


def freed(host: FakeHost) -> bool:
    """Whether who looks after what nobody drives sees to it, once."""
    assert [one.kind for one in settling.find_orphans()] == ["ended"]
    settling.settle_orphans()
    assert settling.find_orphans() == set()
    assert queued() == ["sandboxes_app.tasks.release_sandboxes"]
    run_queue()
    return host.booted == {}


def test_one_that_is_ended_is_freed_although_its_process_was_killed_between(
    host: FakeHost, team_actor: Actor, sandbox: Sandbox, killed: None
) -> None:
    with pytest.raises(BaseException, match=sandbox.pk):
        services.terminate_sandbox(team_actor, sandbox.pk)
    sandbox.refresh_from_db()
    assert sandbox.status == "terminated"
    assert freed(host)


def test_a_start_that_failed_is_freed_although_its_process_was_killed_between(
    host: FakeHost, team_actor: Actor, killed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    boot = host.create_sandbox

    def lose_the_answer(*words: Any, **options: Any) -> None:
        boot(*words, **options)
        raise HostUnavailable("The agent does not answer.")

    monkeypatch.setattr(host, "create_sandbox", lose_the_answer)
    with pytest.raises(BaseException, match="sbx_"):
        services.create_sandbox(team_actor, DEBIAN)
    assert Sandbox.objects.get().status == "failed"
    assert freed(host)


def test_one_that_is_ended_while_it_starts_is_its_starters_to_free(
    host: FakeHost, team_actor: Actor, slow: Callable[[str], SlowCall]
) -> None:
    """Killed then, it leaves a host that starts it, after the one who ended it has seen none."""
    call = slow("create_sandbox")
    creating = Meanwhile(lambda: services.create_sandbox(team_actor, DEBIAN))
    assert call.begun.wait(60)
    row = Sandbox.objects.get()
    services.terminate_sandbox(team_actor, row.pk)
    assert settling.find_orphans() == set()
    assert Sandbox.objects.get().driver == row.driver != ""
    call.go_on.set()
    assert creating.end().status == "terminated"
    assert Sandbox.objects.get().driver == ""
    assert host.booted == {}


def test_one_that_is_ended_names_nobody_when_it_is_freed(
    host: FakeHost, team_actor: Actor, sandbox: Sandbox
) -> None:
    services.terminate_sandbox(team_actor, sandbox.pk)
    assert Sandbox.objects.get().driver == ""
    assert (host.booted, queued()) == ({}, [])


@pytest.mark.parametrize("paused", [True, False])
@pytest.mark.parametrize("status", ["pausing", "resuming"])
def test_a_pause_that_was_cut_off_is_what_the_host_made_of_it(
    host: FakeHost, sandbox: Sandbox, status: str, paused: bool
) -> None:
    host._set_paused(sandbox.pk, None, paused=paused)
    begun = sandbox.started_at
    assert left(sandbox, status) == ("paused" if paused else "running")
    # Only one that stood still begins anew to run.
    assert (sandbox.started_at == begun) is (paused or status == "pausing")


@pytest.mark.parametrize("status", ["pausing", "resuming"])
def test_one_that_ended_meanwhile_has_ended(host: FakeHost, sandbox: Sandbox, status: str) -> None:
    host.end(sandbox.pk, "expired")
    assert left(sandbox, status) == "terminated"


@pytest.mark.parametrize("copied", [True, False])
def test_a_capture_that_was_cut_off_is_what_the_host_made_of_it(
    host: FakeHost, team_actor: Actor, sandbox: Sandbox, copied: bool
) -> None:
    snapshot = services.create_snapshot(team_actor, sandbox.pk, SnapshotSpec())
    Snapshot.objects.update(status="capturing", size_mb=None, driver=NOBODY)
    if not copied:
        host.taken.clear()
    settling.settle_orphans()
    snapshot.refresh_from_db()
    assert settling.find_orphans() == set()
    assert snapshot.status == ("ready" if copied else "failed")
    assert (snapshot.size_mb is not None, snapshot.error_message == "") == (copied, copied)


def test_one_that_was_deleted_while_its_capture_was_cut_off_is_settled_for_good(
    host: FakeHost, team_actor: Actor, sandbox: Sandbox
) -> None:
    snapshot = services.create_snapshot(team_actor, sandbox.pk, SnapshotSpec())
    Snapshot.objects.update(status="capturing", driver=NOBODY, deleted_at=timezone.now())
    settling.settle_orphans()
    assert settling.find_orphans() == set()
    assert snapshot.pk not in host.taken


def test_a_build_whose_driver_is_gone_goes_to_another_once(
    host: FakeHost, team_actor: Actor
) -> None:
    spec = TemplateSpec(name="tools", base_template="debian-12", recipe=["true"])
    template = templates.create_template(team_actor, spec)
    OrmQ.objects.all().delete()
    Template.objects.filter(pk=template.pk).update(driver=NOBODY, started_at=template.created_at)
    for _ in range(2):
        settling.settle_orphans()
    assert queued() == ["templates_app.tasks.drive_builds"]
    run_queue()
    template.refresh_from_db()
    assert template.status == "ready"


def test_a_request_that_was_given_up_is_settled_while_its_process_lives(
    host: FakeHost, team_actor: Actor, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    pause = host.pause_sandbox

    def lose_the_answer(*words: Any) -> None:
        pause(*words)
        raise HostUnavailable("The agent does not answer.")

    monkeypatch.setattr(host, "pause_sandbox", lose_the_answer)
    with pytest.raises(Away):
        services.pause_sandbox(team_actor, sandbox.pk)
    settling.settle_orphans()
    sandbox.refresh_from_db()
    assert sandbox.status == "paused"


def test_nothing_is_settled_while_database_and_host_are_apart(
    host: FakeHost, sandbox: Sandbox
) -> None:
    Installation.objects.update_or_create(only=True, defaults={"mismatch": "of another state"})
    Sandbox.objects.update(status="pausing", driver=NOBODY)
    settling.settle_orphans()
    assert Sandbox.objects.get().status == "pausing"


def test_one_that_is_driven_at_the_second_look_is_let_alone(
    host: FakeHost, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process takes its lock again, after PostgreSQL has restarted."""
    Sandbox.objects.update(status="pausing", driver=NOBODY)
    look, looks = settling.find_orphans, iter([True, False])
    monkeypatch.setattr(settling, "find_orphans", lambda: look() if next(looks) else set())
    settling.settle_orphans()
    assert Sandbox.objects.get().status == "pausing"


def test_all_that_have_ended_are_freed_and_few_of_those_that_no_row_names(
    host: FakeHost, team_actor: Actor, team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host was away while many were ended; if it is rows that are wrong, somebody shall see."""
    monkeypatch.setattr(lifecycle, "UNKNOWN_GRACE_SECONDS", -1.0)
    many = lifecycle.MAX_UNKNOWN_RELEASES + 3
    team.plan.max_concurrent_sandboxes = 3 * many
    team.plan.save()
    ended, unknown = (
        {services.create_sandbox(team_actor, DEBIAN).pk for _ in range(many)} for _ in range(2)
    )
    Sandbox.objects.filter(pk__in=ended).update(status="terminated")
    SandboxEvent.objects.filter(sandbox__in=unknown).delete()
    Sandbox.objects.filter(pk__in=unknown).delete()
    lifecycle.reconcile()
    run_queue()
    assert host.booted.keys() & ended == set()
    assert len(host.booted.keys() & unknown) == 3
