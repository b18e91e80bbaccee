"""Builds beside each other in one worker: as many as may run, and none in another's way."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator

import pytest
from django.conf import settings
from django.db import connection

from orkestr_console.accounts.actor import system_actor
from orkestr_console.accounts.models import Plan, Team
from templates_app import services
from templates_app.models import Template
from templates_app.services import driver, queue
from templates_app.services.driver import run_in_background
from templates_app.specs import TemplateSpec
from tests.fakes.fixtures import run_queue
from tests.fakes.host import FakeHost
from tests.stack import wait_for

pytestmark = pytest.mark.django_db(transaction=True)
MACHINE, PLAN, EACH = 10, 4, 6


def building() -> list[threading.Thread]:
    """The threads that follow builds now."""
    return [thread for thread in threading.enumerate() if thread.name == "build"]


@pytest.fixture(autouse=True)
def worker(plans: None, host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Builds run in threads, as in a worker, and end when the test says so."""
    monkeypatch.setattr(driver, "run_in_background", run_in_background)
    monkeypatch.setattr(driver, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(settings, "BUILDS_AT_ONCE", MACHINE)
    Plan.objects.update(max_concurrent_builds=PLAN)
    host.by_itself = False
    yield
    for image in list(host.built):
        host.cancel_build(image)
    wait_for(lambda: not building(), 60)


def ask(team: str, *names: str) -> None:
    actor = system_actor(Team.objects.create(name=team, slug=team, plan_id="team"))
    for name in names:
        spec = TemplateSpec(name=f"{team}{name}", base_template="debian-12", recipe=["true"])
        services.create_template(actor, spec)


def running() -> Counter[str]:
    """How many builds of each team run."""
    return Counter(Template.objects.running().values_list("team__name", flat=True))


def are_followed(host: FakeHost, number: int) -> None:
    """Wait until so many builds are heard of."""
    wait_for(lambda: host.streams == number, 60, lambda: f"{host.streams} {running()}")


def test_plans_and_the_machine_bound_what_runs_at_once(host: FakeHost) -> None:
    for team in "abc":
        ask(team, *map(str, range(EACH)))
    most: list[int] = []
    while Template.objects.building().exists():
        # Each of these tasks is over at once, however long the builds take.
        run_queue()
        now = running()
        are_followed(host, now.total())
        assert max(now.values()) <= PLAN
        most.append(now.total())
        first = Template.objects.running().order_by("created_at").first()
        assert first is not None
        host.finish(first.image_id)
        wait_for(lambda ended=first: not Template.objects.building().filter(pk=ended.pk), 60)  # type: ignore[misc]
        are_followed(host, now.total() - 1)
    assert (max(most), len(most)) == (MACHINE, 3 * EACH)
    assert {build.starts for build in host.built.values()} == {1}
    assert Template.objects.filter(status="ready").count() == 3 * EACH


def test_what_waits_for_the_machine_says_so(host: FakeHost) -> None:
    for team in "abc":
        ask(team, *map(str, range(PLAN)))
    run_queue()
    places = [queue.queue_position(row) for row in Template.objects.queued().order_by("created_at")]
    assert places == [queue.QueuePosition(1, "host"), queue.QueuePosition(2, "host")]


def test_one_that_crashes_and_one_that_hangs_are_in_nobodys_way(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow, let_go = driver.follow, threading.Event()
    crashes = iter([True])

    def wrongly(template: Template, name: str) -> None:
        if template.name == "ahangs":
            let_go.wait(60)
        if template.name == "acrashes" and next(crashes, False):
            raise ZeroDivisionError
        follow(template, name)

    def two_are_ready() -> bool:
        run_queue()
        return Template.objects.filter(status="ready").count() == 2

    monkeypatch.setattr(driver, "follow", wrongly)
    host.by_itself = True
    ask("a", "crashes", "hangs", "builds")
    try:
        run_queue()
        # The one that crashes is another driver's then; the one that hangs is still its own's.
        wait_for(two_are_ready, 60)
        assert [row.name for row in Template.objects.running()] == ["ahangs"]
    finally:
        let_go.set()
    wait_for(lambda: not Template.objects.building().exists(), 60)
    assert {build.starts for build in host.built.values()} == {1}


def test_all_builds_of_a_worker_are_held_by_one_connection(host: FakeHost) -> None:
    for team in "ab":
        ask(team, *map(str, range(PLAN)))
    run_queue()
    are_followed(host, 2 * PLAN)
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND application_name = 'orkestr drivers'"
        )
        assert cursor.fetchone() == (1,)
    drivers = set(Template.objects.values_list("driver", flat=True))
    assert (len(drivers), "" in drivers) == (2 * PLAN, False)
