"""Whose build is next: fair between teams, and no more of one team at once than its plan allows."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from django.db import OperationalError, connection
from django_q.models import OrmQ

from orkestr_console.accounts.actor import Actor
from orkestr_console.accounts.models import Plan
from orkestr_console.queue.driving import driving
from templates_app import services
from templates_app.models import Template
from templates_app.services import driver, queue
from templates_app.services.record import record
from templates_app.specs import TemplateSpec
from tests.fakes.fixtures import queued
from tests.fakes.host import FakeHost


def ask(actor: Actor, name: str) -> Template:
    spec = TemplateSpec(name=name, base_template="debian-12", recipe=["true"])
    return services.create_template(actor, spec)


type NewDriver = Callable[[], str]


@pytest.fixture
def new_driver() -> Iterator[NewDriver]:
    """Makes drivers that are at it for as long as the test lasts."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(driving())


def taken(new_driver: NewDriver) -> list[str]:
    """The names of the builds that free workers take, in order, until none may begin."""
    names: list[str] = []
    while (template := queue.claim_next(new_driver())) is not None:
        names.append(template.name)
    return names


@pytest.fixture
def at_once(team: object) -> None:
    """Two at once on every plan."""
    Plan.objects.update(max_concurrent_builds=2)


@pytest.mark.usefixtures("host", "at_once")
def test_teams_take_turns_and_none_has_more_than_its_plan(
    actor: Actor, other_actor: Actor, new_driver: NewDriver
) -> None:
    for name in ("a1", "a2", "a3"):
        ask(actor, name)
    for name in ("b1", "b2"):
        ask(other_actor, name)
    assert taken(new_driver) == ["a1", "b1", "a2", "b2"]
    third = Template.objects.get(name="a3")
    assert queue.queue_position(third) == queue.QueuePosition(1, "team")
    services.cancel_template(actor, Template.objects.get(name="a1").pk)
    assert taken(new_driver) == ["a3"]
    assert queue.queue_position(Template.objects.get(name="a3")) is None


@pytest.mark.usefixtures("host", "at_once")
def test_each_queued_build_knows_its_place(
    actor: Actor, other_actor: Actor, new_driver: NewDriver
) -> None:
    mine = [ask(actor, name) for name in ("a1", "a2")]
    theirs = ask(other_actor, "b1")
    numbers = [place.number for row in [*mine, theirs] if (place := queue.queue_position(row))]
    assert numbers == [1, 3, 2]
    assert queue.claim_next(new_driver()) == mine[0]
    numbers = [place.number for row in [mine[1], theirs] if (place := queue.queue_position(row))]
    assert numbers == [2, 1]


@pytest.mark.usefixtures("host", "at_once")
def test_a_build_that_lost_its_driver_comes_first(
    actor: Actor, other_actor: Actor, new_driver: NewDriver
) -> None:
    lost = ask(actor, "a1")
    assert queue.claim_next("drv_1") == lost
    ask(other_actor, "b1")
    driver = new_driver()
    found = queue.claim_next(driver)
    assert (found, found and found.driver) == (lost, driver)


@pytest.mark.usefixtures("at_once")
def test_the_end_of_a_build_calls_a_worker_for_the_next(actor: Actor, host: FakeHost) -> None:
    for name in ("a1", "a2", "a3"):
        ask(actor, name)
    OrmQ.objects.all().delete()
    assert driver.start_next()
    assert Template.objects.get(name="a1").is_ready
    assert queued() == [queue.DRIVE]
    driver.drive()
    assert [row.is_ready for row in Template.objects.all()] == [True, True, True]


def test_a_driver_that_fails_leaves_the_build_to_another(
    actor: Actor, host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "RETRY_SECONDS", 0)
    building = ask(actor, "a1")
    calls = 0

    def fail_once(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise OperationalError("the database went away")
        real(*arguments)

    real = record
    monkeypatch.setattr(driver, "record", fail_once)
    with pytest.raises(OperationalError):
        driver.drive()
    building.refresh_from_db()
    assert building.driver == ""
    assert building.status == "building"
    driver.drive()
    building.refresh_from_db()
    assert building.status == "ready"


def test_takers_at_the_same_moment_keep_to_the_limit(
    plans: None, host: FakeHost, new_driver: NewDriver
) -> None:
    from orkestr_console.accounts.actor import system_actor
    from orkestr_console.accounts.models import Team

    Plan.objects.update(max_concurrent_builds=2, max_templates=50)
    actor = system_actor(Team.objects.create(name="Acme", slug="acme", plan_id="team"))
    for number in range(6):
        ask(actor, f"t{number}")
    found: list[Template | None] = []
    drivers = [new_driver() for _ in range(6)]

    def take(number: int) -> None:
        found.append(queue.claim_next(drivers[number]))
        connection.close()

    threads = [threading.Thread(target=take, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(row.name for row in found if row) == ["t0", "t1"]
