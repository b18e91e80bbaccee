"""A burst of callers waits for connections, and none is sent away while the database serves."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from django.db import connection, connections
from psycopg_pool import PoolTimeout

from orkestr_console.accounts.limits import held
from orkestr_console.accounts.models import Team
from orkestr_console.core.database.queueing import Queue
from tests.fakes.watched import in_use

STALLED_SECONDS = 0.3


@pytest.fixture
def small_pool(plans: None) -> Iterator[Any]:
    """A pool of two connections, of which one has to come free within a third of a second."""
    wrapper: Any = connection
    pool = wrapper.settings_dict["OPTIONS"]["pool"]
    before = dict(pool)
    wrapper.close()
    wrapper.close_pool()
    pool |= {"min_size": 1, "max_size": 2, "timeout": STALLED_SECONDS}
    yield wrapper
    wrapper.close()
    wrapper.close_pool()
    pool.clear()
    pool |= before


def at_once(number: int, call: Callable[[int], object]) -> list[object]:
    """What each of so many threads returns, or the error it raises."""
    gate = threading.Barrier(number)

    def outcome(which: int) -> object:
        gate.wait(20)
        try:
            return call(which)
        except Exception as error:  # noqa: BLE001 - it is what is looked at
            return error
        finally:
            connections.close_all()

    with ThreadPoolExecutor(number) as threads:
        return list(threads.map(outcome, range(number)))


@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("small_pool")
def test_a_burst_is_worked_off_however_long_it_takes() -> None:
    """Here six times as long as one may wait while nothing moves."""

    def slow(_: int) -> object:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_sleep(0.1)")
        return None

    assert at_once(36, slow) == [None] * 36


@pytest.mark.django_db(transaction=True)
def test_nobody_waits_for_a_database_that_serves_nobody(small_pool: Any) -> None:
    def hold(_: int) -> object:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_sleep(3)")
        return None

    outcomes = at_once(6, hold)
    assert outcomes.count(None) == 2
    errors = [each.__cause__ for each in outcomes if isinstance(each, Exception)]
    assert [type(error) for error in errors] == [PoolTimeout] * 4


@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("small_pool")
def test_a_team_that_waits_for_itself_holds_one_connection() -> None:
    """Not all of them, for which every other team would have to wait."""
    team = Team.objects.create(name="Busy", slug="busy", plan_id="team")
    connection.close()
    most: list[int] = []

    def create(_: int) -> object:
        with held(team):
            time.sleep(0.05)
            most.append(in_use())
        return None

    assert at_once(12, create) == [None] * 12
    assert max(most) == 1


def test_places_are_given_in_the_order_of_arrival() -> None:
    queue = Queue(1, stalled_seconds=20, longest_seconds=20)
    assert queue.enter()
    order: list[int] = []
    threads = []

    def wait(number: int) -> None:
        queue.enter()
        order.append(number)

    for number in range(5):
        thread = threading.Thread(target=wait, args=[number])
        thread.start()
        threads.append(thread)
        while len(queue._waiting) <= number:
            time.sleep(0.001)
    for number in range(5):
        queue.leave(served=True)
        threads[number].join(20)
    assert order == list(range(5))


def test_a_place_that_was_given_up_is_given_to_the_next() -> None:
    queue = Queue(1, stalled_seconds=0.05, longest_seconds=1)
    assert queue.enter()
    assert not queue.enter()
    queue.leave(served=True)
    assert queue.enter()
