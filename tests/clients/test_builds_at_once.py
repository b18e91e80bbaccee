"""Many builds at once, really: no more than may, nothing short waits for them, and none is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from hostruntime.host.patience import scaled
from orkestr_console.core.machine import max_concurrent_builds
from orkestr_console.queue.driving import HELD_LOCKS_SQL, LOCK_SEED
from tests.clients.making import Templates
from tests.faults.processes import children, leads_a_group
from tests.stack import Stack, wait_for

PLAN = 8
MOST = min(PLAN, max_concurrent_builds())
# Long enough for all to run beside each other, on a slow machine too.
STEP_SECONDS = scaled(40.0)
# What a task waits for a worker, and takes.
SHORT_SECONDS = scaled(5.0)
# What nobody drives is looked for by the listener (sandboxes_app.services.listening).
TAKEN_ON_SECONDS = scaled(15.0)
RUNNING = "FROM templates_app_template WHERE status = 'building' AND started_at IS NOT NULL"
SHORT = """
from django_q.tasks import async_task, fetch_group
for task, *words in (
    ("sandboxes_app.tasks.tidy",),
    ("sandboxes_app.tasks.release_sandbox", "sbx_that_never_was"),
    ("templates_app.tasks.forget_image", "img_that_never_was"),
):
    async_task(task, *words, group="short")
tasks = fetch_group("short", count=3, wait=120_000)
print(max((task.stopped - task.started).total_seconds() for task in tasks))
"""


@pytest.fixture
def database(stack: Stack) -> Iterator[psycopg.Connection[Any]]:
    """The installation's own, with eight builds at once on every plan while the test lasts."""
    with psycopg.connect(stack.layout.cluster.url, autocommit=True) as database:
        plans = database.execute("SELECT code, max_concurrent_builds FROM accounts_plan").fetchall()
        database.execute("UPDATE accounts_plan SET max_concurrent_builds = %s", [PLAN])
        yield database
        for code, number in plans:
            database.execute(
                "UPDATE accounts_plan SET max_concurrent_builds = %s WHERE code = %s",
                [number, code],
            )


def running(database: psycopg.Connection[Any]) -> int:
    """How many builds have begun and not ended."""
    return len(database.execute(f"SELECT id {RUNNING}").fetchall())


def drivers(database: psycopg.Connection[Any]) -> set[str]:
    """Who follows builds now, one a build."""
    driven = f"hashtextextended(driver, {LOCK_SEED}) IN ({HELD_LOCKS_SQL})"
    return {driver for (driver,) in database.execute(f"SELECT driver {RUNNING} AND {driven}")}


def workers(stack: Stack) -> list[int]:
    """Every process of the worker's group but its guard."""
    guards = [pid for pid in children(stack.pid("worker")) if leads_a_group(pid)]
    return [pid for guard in guards for pid in children(guard)]


def test_many_builds_run_at_once_and_outlive_their_workers(
    stack: Stack, templates: Templates, database: psycopg.Connection[Any]
) -> None:
    made = [templates.create("debian-12", f"sleep {STEP_SECONDS:.0f}") for _ in range(PLAN)]
    made += [templates.create("debian-12", "true") for _ in range(2)]
    wait_for(lambda: len(drivers(database)) == MOST, 120, stack.explain)
    waits_for = {templates.get(one)["queue"]["waits_for"] for one in made[-2:]}
    assert waits_for == {"team" if MOST == PLAN else "host"}

    said = stack.manage("shell", "--no-imports", "-c", SHORT)
    assert said.returncode == 0, said.stderr
    assert float(said.stdout.split()[-1]) < SHORT_SECONDS, said.stdout
    before = drivers(database)
    assert len(before) == MOST, "the builds were over before the tasks were"

    for pid in workers(stack):
        os.kill(pid, signal.SIGKILL)
    wait_for(
        lambda: len(drivers(database) - before) == running(database) == MOST,
        TAKEN_ON_SECONDS,
        stack.explain,
    )

    def all_over() -> bool:
        now = running(database)
        assert now <= MOST
        return now == 0

    wait_for(all_over, STEP_SECONDS + 300, stack.explain)
    records = [templates.finished(one) for one in made]
    assert [record["status"] for record in records] == ["ready"] * len(made)
    for one in made:
        kinds = [event["kind"] for event in templates.events(one)]
        assert (kinds.count("boot"), kinds.count("published")) == (1, 1)
