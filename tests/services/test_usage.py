"""What is used is counted once, on the right day, whatever crashes and however often it is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
from django.db import connection
from django.utils import timezone

from hostruntime.errors import HostUnavailable
from hostruntime.wire.sandboxes import DailyUsage, ResourceUsage, UsageInfo
from orkestr_console.accounts import usage
from orkestr_console.accounts.actor import Actor
from orkestr_console.accounts.models import Metric, Team, UsageDay
from orkestr_console.accounts.usage import Key
from sandboxes_app import services, tasks
from sandboxes_app.models import Sandbox
from sandboxes_app.services import metering
from sandboxes_app.specs import SandboxSpec
from templates_app import services as templates
from templates_app.models import BuildEvent, Template, TemplateStatus
from templates_app.services.record import mark_failed
from templates_app.specs import TemplateSpec
from tests.fakes.fixtures import MakeTemplate
from tests.fakes.host import FakeHost

pytestmark = pytest.mark.django_db

MONDAY, TUESDAY = date(2026, 11, 23), date(2026, 11, 24)
MIDNIGHT = datetime(2026, 11, 24, tzinfo=UTC)


@pytest.fixture
def sandbox(actor: Actor, host: FakeHost) -> Sandbox:
    return services.create_sandbox(actor, SandboxSpec(template="debian-12"))


def tell(
    host: FakeHost,
    sandbox: Sandbox,
    *days: tuple[date, float, float],
    before: ResourceUsage | None = None,
    ended: bool = False,
) -> None:
    """Let the host say what a sandbox has used in all: ``(day, cpu_seconds, gb_seconds)``."""
    parts = tuple(DailyUsage(cpu, gb, day=day) for day, cpu, gb in days)
    host.used[sandbox.pk] = UsageInfo(sandbox.pk, ended, before or ResourceUsage(), parts)


def counted(team: Team, metric: Metric = Metric.VCPU_SECONDS) -> dict[date, float]:
    rows = UsageDay.objects.filter(team=team, metric=metric).order_by("day")
    return {row.day: round(row.amount, 6) for row in rows}


# Sandboxes ------------------------------------------------------------------------------------


def test_only_the_difference_is_added(host: FakeHost, sandbox: Sandbox, team: Team) -> None:
    tell(host, sandbox, (MONDAY, 10, 4))
    tasks.tidy()
    tasks.tidy()
    assert counted(team) == {MONDAY: 10}
    tell(host, sandbox, (MONDAY, 12.5, 5))
    tasks.tidy()
    assert counted(team) == {MONDAY: 12.5}
    assert counted(team, Metric.GB_SECONDS) == {MONDAY: 5}
    sandbox.refresh_from_db()
    assert (sandbox.cpu_seconds, sandbox.gb_seconds) == (12.5, 5)


def test_each_day_gets_what_was_used_on_it(host: FakeHost, sandbox: Sandbox, team: Team) -> None:
    tell(host, sandbox, (MONDAY, 10, 4))
    tasks.tidy()
    tell(host, sandbox, (MONDAY, 13, 5), (TUESDAY, 2, 1))
    tasks.tidy()
    assert counted(team) == {MONDAY: 13, TUESDAY: 2}
    assert counted(team, Metric.GB_SECONDS) == {MONDAY: 5, TUESDAY: 1}


def test_days_the_host_has_added_up_are_not_lost(
    host: FakeHost, sandbox: Sandbox, team: Team
) -> None:
    tell(host, sandbox, (MONDAY, 10, 4))
    tasks.tidy()
    # Monday was 11 in the end, one of which nobody had collected.
    tell(host, sandbox, (TUESDAY, 2, 1), before=ResourceUsage(11, 4))
    tasks.tidy()
    tasks.tidy()
    assert counted(team) == {MONDAY: 10, TUESDAY: 3}


def test_several_sandboxes_of_several_teams(
    host: FakeHost, actor: Actor, other_actor: Actor, sandbox: Sandbox
) -> None:
    second = services.create_sandbox(actor, SandboxSpec(template="debian-12"))
    foreign = services.create_sandbox(other_actor, SandboxSpec(template="debian-12"))
    for number, box in enumerate([sandbox, second, foreign], start=1):
        tell(host, box, (MONDAY, number, number))
    tasks.tidy()
    assert counted(actor.team) == {MONDAY: 3}
    assert counted(other_actor.team) == {MONDAY: 3}


def test_the_host_forgets_only_what_has_ended(host: FakeHost, sandbox: Sandbox) -> None:
    tell(host, sandbox, (MONDAY, 1, 1))
    tasks.tidy()
    assert sandbox.pk in host.used
    tell(host, sandbox, (MONDAY, 1, 1), ended=True)
    tasks.tidy()
    assert host.used == {}


def test_what_has_no_row_is_forgotten(host: FakeHost, sandbox: Sandbox) -> None:
    tell(host, sandbox, (MONDAY, 1, 1), ended=True)
    Sandbox.objects.all().delete()
    tasks.tidy()
    assert host.used == {}
    assert not UsageDay.objects.exists()


def test_terminating_counts_at_once_and_asks_the_host_once(
    host: FakeHost, actor: Actor, sandbox: Sandbox, team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = services.create_sandbox(actor, SandboxSpec(template="debian-12"))
    for each in (sandbox, other):
        tell(host, each, (MONDAY, 7, 3))
    with monkeypatch.context() as patched:
        for more in ("usage", "acknowledge_usage"):
            patched.delattr(FakeHost, more)
        services.terminate_sandbox(actor, sandbox.pk)
        assert counted(team) == {MONDAY: 7}
        # The host may forget it with the next, or with the next pass.
        services.terminate_sandbox(actor, other.pk)
    assert counted(team) == {MONDAY: 14}
    assert list(host.used) == [other.pk]
    tasks.tidy()
    assert counted(team) == {MONDAY: 14}
    assert host.used == {}


@pytest.mark.django_db(transaction=True)
def test_what_somebody_counts_while_it_is_terminated_is_not_counted_again(
    plans: None, host: FakeHost, actor: Actor, team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox = services.create_sandbox(actor, SandboxSpec(template="debian-12"))
    tell(host, sandbox, (MONDAY, 7, 3))
    last = metering.count_last

    def after_another(*args: Any) -> bool:
        metering.collect()
        assert counted(team) == {MONDAY: 7}
        return last(*args)

    monkeypatch.setattr(metering, "count_last", after_another)
    services.terminate_sandbox(actor, sandbox.pk)
    assert counted(team) == {MONDAY: 7}
    assert Sandbox.objects.get(pk=sandbox.pk).driver == ""


def test_terminating_does_not_count_the_others(
    host: FakeHost, actor: Actor, sandbox: Sandbox, team: Team
) -> None:
    other = services.create_sandbox(actor, SandboxSpec(template="debian-12"))
    tell(host, other, (MONDAY, 7, 3))
    services.terminate_sandbox(actor, sandbox.pk)
    assert counted(team) == {}


def test_one_terminated_while_the_host_is_away_is_counted_later(
    host: FakeHost, actor: Actor, sandbox: Sandbox, team: Team
) -> None:
    tell(host, sandbox, (MONDAY, 7, 3))
    host.down = True
    services.terminate_sandbox(actor, sandbox.pk)
    tasks.tidy()
    assert counted(team) == {}
    host.down = False
    tasks.release_sandbox(sandbox.pk)
    assert counted(team) == {MONDAY: 7}


def test_a_collector_that_dies_before_the_end_counts_nothing(
    host: FakeHost, sandbox: Sandbox, team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell(host, sandbox, (MONDAY, 10, 4), ended=True)

    def die(amounts: dict[Key, float]) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(usage, "add", die)
        with pytest.raises(RuntimeError):
            metering.collect()
    sandbox.refresh_from_db()
    assert sandbox.cpu_seconds == 0
    assert sandbox.pk in host.used
    metering.collect()
    assert counted(team) == {MONDAY: 10}


def test_a_collector_that_dies_before_the_host_forgets_counts_once(
    host: FakeHost, sandbox: Sandbox, team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell(host, sandbox, (MONDAY, 10, 4), ended=True)

    def die(ids: list[str]) -> None:
        raise HostUnavailable("gone")

    with monkeypatch.context() as patch:
        patch.setattr(host, "acknowledge_usage", die)
        with pytest.raises(HostUnavailable):
            metering.collect()
    metering.collect()
    assert counted(team) == {MONDAY: 10}
    assert host.used == {}


def test_a_host_that_lost_its_sums_takes_nothing_away(
    host: FakeHost, sandbox: Sandbox, team: Team
) -> None:
    tell(host, sandbox, (MONDAY, 10, 4))
    metering.collect()
    tell(host, sandbox, (MONDAY, 3, 1))
    metering.collect()
    assert counted(team) == {MONDAY: 10}
    sandbox.refresh_from_db()
    assert sandbox.cpu_seconds == 10


@pytest.mark.django_db(transaction=True)
def test_two_collectors_at_once_count_once(
    plans: None, host: FakeHost, actor: Actor, team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes = [
        services.create_sandbox(actor, SandboxSpec(template="debian-12", size="small"))
        for _ in range(3)
    ]
    for number, box in enumerate(boxes, start=1):
        tell(host, box, (MONDAY, number, number), (TUESDAY, 1, 1))
    entered, go_on = threading.Event(), threading.Event()
    failures: list[Exception] = []

    def dawdle(amounts: dict[Key, float], add: Callable[..., None] = usage.add) -> None:
        entered.set()
        go_on.wait(10)
        add(amounts)

    def collect() -> None:
        try:
            metering.collect()
        except Exception as error:  # noqa: BLE001 - told below
            failures.append(error)
        finally:
            connection.close()

    monkeypatch.setattr(usage, "add", dawdle)
    threads = [threading.Thread(target=collect) for _ in range(3)]
    threads[0].start()
    assert entered.wait(10)
    # The first has read and changed the rows and has not committed; now come the others.
    for thread in threads[1:]:
        thread.start()
    time.sleep(0.5)
    go_on.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert counted(team) == {MONDAY: 6, TUESDAY: 3}


# Builds ---------------------------------------------------------------------------------------


@pytest.fixture
def building(actor: Actor, host: FakeHost) -> Template:
    spec = TemplateSpec(name="tools", base_template="debian-12", recipe=["true"])
    template = templates.create_template(actor, spec)
    # It was asked for before anything that the tests let the host tell, on whatever day they run.
    template.events.update(at=MIDNIGHT - timedelta(days=1))
    return template


def event(template: Template, seq: int, kind: str, at: datetime) -> None:
    """One that the host told, after the console's own first."""
    BuildEvent.objects.create(template=template, seq=seq + 1, host_seq=seq, kind=kind, at=at)


def test_a_finished_build_is_counted_by_its_events(make_template: MakeTemplate, team: Team) -> None:
    template = make_template()
    told = template.events.exclude(host_seq=None)
    at = list(told.values_list("at", flat=True))
    total = sum(counted(team, Metric.BUILD_SECONDS).values())
    assert total == pytest.approx((at[-1] - at[0]).total_seconds(), abs=1e-5)


def test_a_failed_build_counts_over_midnight(building: Template, team: Team) -> None:
    event(building, 1, "boot", MIDNIGHT - timedelta(seconds=90))
    event(building, 2, "failed", MIDNIGHT + timedelta(seconds=30))
    mark_failed(building, "step_failed", "It failed.")
    assert counted(team, Metric.BUILD_SECONDS) == {MONDAY: 90, TUESDAY: 30}


def test_a_build_the_host_never_began_counts_for_nothing(building: Template, team: Team) -> None:
    mark_failed(building, "no_room", "There was no room.")
    assert counted(team, Metric.BUILD_SECONDS) == {}


def test_a_build_deleted_while_it_runs_counts_until_then(
    actor: Actor, building: Template, team: Team
) -> None:
    event(building, 1, "boot", timezone.now() - timedelta(seconds=40))
    templates.delete_template(actor, building.pk)
    total = sum(counted(team, Metric.BUILD_SECONDS).values())
    assert total == pytest.approx(40, abs=5)


def test_deleting_a_finished_one_counts_no_more(
    actor: Actor, building: Template, team: Team
) -> None:
    event(building, 1, "boot", MIDNIGHT)
    event(building, 2, "failed", MIDNIGHT + timedelta(seconds=30))
    mark_failed(building, "step_failed", "It failed.")
    templates.delete_template(actor, building.pk)
    assert counted(team, Metric.BUILD_SECONDS) == {TUESDAY: 30}


# Images ---------------------------------------------------------------------------------------


def ready(actor: Actor, **sizes: int) -> Template:
    facts: dict[str, Any] = {"base_template": "debian-12", "base_image": "debian-12", "recipe": []}
    return Template.objects.create(
        team=actor.team, name="t", status=TemplateStatus.READY, **facts, **sizes
    )


def test_a_day_keeps_the_most_that_images_took(actor: Actor, host: FakeHost) -> None:
    first = ready(actor, size_bytes=900, shared_bytes=600)
    ready(actor, size_bytes=100, shared_bytes=50)
    tasks.tidy()
    first.delete()
    tasks.tidy()
    today = usage.today()
    assert counted(actor.team, Metric.IMAGE_BYTES) == {today: 350}
    assert counted(actor.team, Metric.SHARED_BYTES) == {today: 650}


def test_an_image_is_noted_as_soon_as_it_is_published(
    make_template: MakeTemplate, team: Team
) -> None:
    make_template()
    today = usage.today()
    assert counted(team, Metric.IMAGE_BYTES) == {today: 1_000}
    assert counted(team, Metric.SHARED_BYTES) == {today: 4_000}


def test_images_are_noted_while_the_host_is_away(actor: Actor, host: FakeHost) -> None:
    ready(actor, size_bytes=900, shared_bytes=600)
    host.down = True
    tasks.tidy()
    assert counted(actor.team, Metric.IMAGE_BYTES) == {usage.today(): 300}


# Reading --------------------------------------------------------------------------------------


def test_a_month_has_all_its_days_and_nothing_of_others(actor: Actor, other_actor: Actor) -> None:
    for team, day, amount in [
        (actor.team, date(2026, 1, 31), 1.0),
        (actor.team, date(2026, 2, 1), 2.0),
        (actor.team, date(2026, 2, 28), 4.0),
        (other_actor.team, date(2026, 2, 1), 64.0),
    ]:
        usage.add({Key(team.pk, day, Metric.VCPU_SECONDS): amount})
        usage.raise_maximum({Key(team.pk, day, Metric.IMAGE_BYTES): amount})
    month = usage.month(actor, date(2026, 2, 1))
    assert [day.day.day for day in month.days] == list(range(1, 29))
    assert month.total(Metric.VCPU_SECONDS) == 6
    assert month.total(Metric.IMAGE_BYTES) == 4
    assert month.total(Metric.GB_SECONDS) == 0
    assert (month.before, month.after) == (date(2026, 1, 1), date(2026, 3, 1))
    assert usage.months(actor) == [date(2026, 2, 1), date(2026, 1, 1)]
