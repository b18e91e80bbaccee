"""One slot left, and many callers in several processes at the same moment."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import pytest
from django.db import connection

from orkestr_console.accounts import limit_changes
from orkestr_console.accounts.actor import Actor
from orkestr_console.accounts.limit_changes import LimitsSpec
from templates_app.models import Template

TREE = Path(__file__).resolve().parents[2]
PROCESSES = 2
CALLS_EACH = 10

# Waits at a gate so that all calls of both processes are made at once.
CALLER = """
    import sys, threading
    from concurrent.futures import ThreadPoolExecutor

    import django
    django.setup()
    from django.db import connections
    from orkestr_console.accounts.actor import system_actor
    from orkestr_console.accounts.models import Team
    from orkestr_console.core.errors import PlanLimit
    from orkestr_console.core import hosts
    from templates_app import services
    from templates_app.specs import TemplateSpec
    from tests.fakes.host import FakeHost

    hosts.host_client = lambda socket: FakeHost()
    calls = int(sys.argv[2])
    team = Team.objects.get(pk=sys.argv[1])
    gate = threading.Barrier(calls + 1)

    def create(number):
        gate.wait()
        try:
            services.create_template(
                system_actor(team),
                TemplateSpec(name=f"race {number}", base_template="debian-12", recipe=["true"]),
            )
            return "made"
        except PlanLimit:
            return "refused"
        finally:
            connections.close_all()

    with ThreadPoolExecutor(calls) as pool:
        outcomes = [pool.submit(create, number) for number in range(calls)]
        print("ready", flush=True)
        sys.stdin.readline()
        gate.wait()
        print(" ".join(outcome.result() for outcome in outcomes))
"""


@pytest.mark.usefixtures("plans")
@pytest.mark.django_db(transaction=True)
def test_twenty_callers_in_two_processes_take_one_slot_once(console_actor: Actor) -> None:
    limit_changes.set_team_limits(console_actor, LimitsSpec(numbers={"max_templates": 1}))
    callers = [caller(console_actor.team.pk) for _ in range(PROCESSES)]
    try:
        assert [line(process) for process in callers] == ["ready"] * PROCESSES
        for process in callers:
            open_gate(process)
        outcomes = " ".join(line(process) for process in callers).split()
    finally:
        for process in callers:
            process.kill()
            process.wait()
    assert sorted(outcomes) == ["made"] + ["refused"] * (PROCESSES * CALLS_EACH - 1)
    assert Template.objects.for_team(console_actor.team).using_slots().count() == 1


def caller(team_id: str) -> subprocess.Popen[str]:
    """A process of its own on the test's database."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CALLER), team_id, str(CALLS_EACH)],
        cwd=TREE,
        env={
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "orkestr_console.settings",
            "DATABASE_URL": url_of_this_database(),
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def url_of_this_database() -> str:
    """``DATABASE_URL`` with the name that the test runner made of it."""
    address = urlsplit(os.environ["DATABASE_URL"])
    return urlunsplit(address._replace(path=f"/{connection.settings_dict['NAME']}"))


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def open_gate(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()
