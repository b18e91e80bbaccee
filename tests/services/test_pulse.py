"""When the watchdog takes a group for stuck: not for being slow."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from hostruntime.host.patience import slowness
from orkestr_console.core import processes
from orkestr_console.core.processes import Heartbeats
from orkestr_console.queue.worker import GROUP, PUSHER, SENTINEL
from tests.programs import IDLING, WORKING, python, running
from tests.stack import wait_for

TREE = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ORKESTR_PATIENCE", "1")
    monkeypatch.setattr(processes, "STALE_SECONDS", 0.8)
    slowness.cache_clear()
    yield
    slowness.cache_clear()


def test_a_pusher_that_is_long_over_a_round_but_works_is_not_stuck() -> None:
    pulse = Heartbeats(GROUP)
    with ExitStack() as stack:
        for which in (SENTINEL, PUSHER):
            pulse._pids[which] = stack.enter_context(running(python(WORKING, 30))).pid
        with pytest.raises(AssertionError, match="not within"):
            wait_for(lambda: bool(pulse.stuck()), 3)


def test_a_group_that_comes_round_is_never_stuck() -> None:
    """However long it has been watched: it sleeps most of the time, as it may."""
    pulse = Heartbeats(GROUP)

    def beaten_and_stuck() -> bool:
        for which in (SENTINEL, PUSHER):
            pulse.beat(which)
        return bool(pulse.stuck())

    with pytest.raises(AssertionError, match="not within"):
        wait_for(beaten_and_stuck, 10 * 0.8 + 1)


@pytest.mark.parametrize("which", [SENTINEL, PUSHER])
def test_one_that_comes_round_no_more_and_does_nothing_is_stuck(which: int) -> None:
    pulse = Heartbeats(GROUP)
    with running(python(IDLING)) as process:
        pulse.beat(1 - which)
        pulse._pids[which] = process.pid

        def stuck() -> bool:
            pulse._beats[1 - which] += 1
            return bool(pulse.stuck())

        wait_for(stuck, 30)
        assert f"did nothing for 0.8 s (python ({process.pid}) sleeps)" in pulse.stuck()


LIMITS = """\
import django; django.setup()
from orkestr_console.queue import driving
from orkestr_console.core import processes
from orkestr_console.queue import worker
from hostruntime.client import host_client as client
from hostruntime.container import exec
print(client._TIMEOUT.read, processes.STALE_SECONDS, driving.ORPHAN_GRACE_SECONDS,
      worker.STOP_SECONDS, exec.GRACE_SECONDS)
"""


def test_limits_that_cannot_follow_are_longer_on_a_slow_machine_and_promises_are_not() -> None:
    environment = {**os.environ, "DJANGO_SETTINGS_MODULE": "orkestr_console.settings"}
    environment.pop("ORKESTR_WORKER_STALE", None)
    said = [
        subprocess.run(
            [sys.executable, "-c", LIMITS],
            cwd=TREE,
            env={**environment, "ORKESTR_PATIENCE": patience},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for patience in ("1", "20")
    ]
    assert said == [
        ["60.0", "30.0", "2.0", "8.0", "2.0"],
        ["1200.0", "600.0", "40.0", "8.0", "2.0"],
    ]
