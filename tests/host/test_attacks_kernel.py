"""The attack table: what a hostile program tries from inside, and how each attempt ends.

Every program of attacks runs once, in one sandbox; a case then judges one attack by what the
program said of it.  An attack that did not run, for whatever reason, is a failure.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostruntime.host.paths import StatePaths
from hostruntime.wire.commands import Exec
from hostruntime.wire.sandboxes import CreateSandbox
from tests.host.agent import Agent, mounts_below
from tests.host.attackers import outcomes
from tests.host.attacks import kernel, surroundings
from tests.host.attacks.harness import Outcome
from tests.host.warm import create_from_warm, keeping_warm

pytestmark = pytest.mark.host

_SETTINGS = ("core_pattern", "modprobe", "panic", "hostname", "domainname", "sysrq")

_FILES = (
    *("/proc/sys/vm/overcommit_memory", "/proc/sys/vm/mmap_min_addr"),
    *("/proc/sys/net/ipv4/ip_forward", "/proc/swaps", "/sys/class/net/lo/mtu"),
    *("/sys/kernel/rcu_expedited", "/sys/kernel/uevent_helper"),
)


def state_of_the_host() -> dict[str, object]:
    """What the attacks would have changed if one had worked, and nothing that others change."""
    files = [*(f"/proc/sys/kernel/{name}" for name in _SETTINGS), *_FILES]
    modules = Path("/proc/modules")
    return {
        **{path: Path(path).read_text() if Path(path).exists() else None for path in files},
        "dummy": modules.exists() and "\ndummy " in f"\n{modules.read_text()}",
        "groups": [str(path) for path in Path("/sys/fs/cgroup").iterdir() if path.name == "x"],
        "mounts": [path for path in mounts_below(Path("/root")) if path.startswith("/root/tmp")],
        "mounts in proc": mounts_below(Path("/proc")),
    }


type Results = dict[str, Outcome]


@pytest.fixture(scope="module", params=["cold", "warm"])
def results(
    request: pytest.FixtureRequest, agent: Agent, attackers: str
) -> Iterator[dict[str, Results]]:
    host, name = agent.client, f"sbx_attack{time.time_ns():x}"
    wanted = CreateSandbox(name, image=attackers, cpu=2.0, memory_mb=512, network="open")
    if request.param == "warm":
        with keeping_warm(agent):
            create_from_warm(agent, wanted)
    else:
        host.create_sandbox(wanted)
    before, clock = state_of_the_host(), time.time() - time.monotonic()
    told = {
        "HOST_PIDS": f"{agent.pid}:{os.getpid()}",
        "HOST_PATHS": f"{agent.state}:{StatePaths(agent.state).images}:/run/orkestr",
    }
    try:
        yield {
            "kernel": outcomes(host, name, "kernel"),
            "surroundings": outcomes(host, name, "surroundings", told),
        }
        assert host.exec(name, Exec("echo alive")).stdout == b"alive\n"
        assert state_of_the_host() == before
        assert abs(time.time() - time.monotonic() - clock) < 1, "somebody turned the clock"
    finally:
        host.delete_sandbox(name)


@pytest.mark.parametrize("name", kernel.TABLE)
def test_no_system_call_gets_anywhere(results: dict[str, Results], name: str) -> None:
    outcome = results["kernel"][name]
    assert outcome.result in kernel.TABLE[name].expected, outcome.detail


@pytest.mark.parametrize("name", surroundings.TABLE)
def test_nothing_around_a_container_leads_out(results: dict[str, Results], name: str) -> None:
    outcome = results["surroundings"][name]
    assert outcome.result in surroundings.TABLE[name].expected, outcome.detail


def test_the_programs_ran_every_attack_of_their_tables(results: dict[str, Results]) -> None:
    assert list(results["kernel"]) == list(kernel.TABLE)
    assert list(results["surroundings"]) == list(surroundings.TABLE)
    assert len(kernel.TABLE) + len(surroundings.TABLE) >= 60
