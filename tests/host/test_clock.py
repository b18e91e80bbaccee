"""A clock that is set an hour forward or back: what was to end after so long still does.

Nobody may set the machine's clock for a test, so the agent alone is shown another one (jump.c).
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hostruntime.sandbox.manager import SWEEP_SECONDS
from hostruntime.sandbox.warm_pool import SETTING
from tests.host.agent import Agent, eventually
from tests.host.client import HostClient
from tests.host.conftest import NewSandbox

HOUR = 3600
SOURCE = Path(__file__).with_name("jump.c")

SetClock = Callable[[int], None]


@pytest.fixture(scope="module")
def other_clock(agent: Agent, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SetClock]:
    """Has the agent look at a clock that can be set, so many seconds before the machine's."""
    directory = tmp_path_factory.mktemp("clock")
    library, ahead = directory / "jump.so", directory / "ahead"
    compiled = ["gcc", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"]
    subprocess.run(compiled, check=True, timeout=60)

    def jump(seconds: int) -> None:
        written = ahead.with_suffix(".new")
        written.write_text(str(seconds))
        written.rename(ahead)

    jump(0)
    restarted(agent, {"LD_PRELOAD": str(library), "JUMP_FILE": str(ahead)})
    yield jump
    restarted(agent, {})


@pytest.fixture
def set_clock(other_clock: SetClock) -> Iterator[SetClock]:
    """Sets the agent's clock so many seconds before or after the machine's, until the test ends."""
    yield other_clock
    other_clock(0)


def restarted(agent: Agent, environment: dict[str, str]) -> None:
    agent.stop()
    agent.environment = {SETTING: "0", **environment}
    agent.start()


def some_sweeps() -> None:
    time.sleep(6 * SWEEP_SECONDS)


@pytest.mark.parametrize("paused", [False, True])
def test_an_hour_forward_ends_nothing_early(
    agent: Agent, host: HostClient, new_sandbox: NewSandbox, set_clock: SetClock, *, paused: bool
) -> None:
    sandbox = new_sandbox(deadline=time.time() + 600)
    if paused:
        host.pause_sandbox(sandbox.id, time.time() + 600)
    set_clock(HOUR)
    some_sweeps()
    found = host.sandbox(sandbox.id)
    assert found.state == "running"
    # What is said of its end is by the clock as it goes now.
    assert found.deadline is not None
    assert 500 < found.deadline - HOUR - time.time() < 610
    restarted(agent, agent.environment)
    some_sweeps()
    assert host.sandbox(sandbox.id).state == "running"


def test_an_hour_back_ends_nothing_late(
    host: HostClient, new_sandbox: NewSandbox, set_clock: SetClock
) -> None:
    sandbox = new_sandbox(deadline=time.time() + 5)
    set_clock(-HOUR)
    for _ in eventually(120):
        if host.sandbox(sandbox.id).state == "gone":
            break
    assert host.sandbox(sandbox.id).reason == "expired"
