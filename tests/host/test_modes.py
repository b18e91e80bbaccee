"""Directories have the modes they should, whatever an agent is started with or finds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hostruntime.host.rundir import RUN_ROOT
from hostruntime.wire.sandboxes import CreateSandbox
from tests.host.agent import Agent
from tests.host.small import IMAGE, a_small_agent

pytestmark = pytest.mark.host

PASSED_THROUGH = {"", "lxc", "roots"}
PROXYS = "egress"


def modes(agent: Agent) -> dict[str, str]:
    """The mode of each directory of an agent's run directory, by its name; ``""`` is its own."""
    run = RUN_ROOT / agent.prefix.removeprefix("ork").removesuffix("-")
    found = {"": run} | {path.name: path for path in run.iterdir() if path.is_dir()}
    return {name: f"{path.stat().st_mode & 0o7777:o}" for name, path in found.items()}


@pytest.fixture(params=[0o000, 0o077], ids=["umask 000", "umask 077"])
def agent_with_umask(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Agent]:
    with a_small_agent(tmp_path / "state", umask=request.param) as agent:
        yield agent


def test_they_do_not_depend_on_the_umask(agent_with_umask: Agent) -> None:
    agent = agent_with_umask
    agent.client.create_sandbox(CreateSandbox("sbx_mask", image=IMAGE, cpu=1, memory_mb=128))
    found = modes(agent)
    assert found.keys() >= {*PASSED_THROUGH, PROXYS, "disks", "netns", "slots", "sysfs"}
    for name, mode in found.items():
        wanted = "711" if name in PASSED_THROUGH else "2750" if name == PROXYS else "700"
        assert mode == wanted, name
    state = [agent.state, *(path for path in agent.state.iterdir() if path.is_dir())]
    assert {f"{path.stat().st_mode & 0o7777:o}" for path in state} == {"700"}
    disk = RUN_ROOT / agent.prefix.removeprefix("ork").removesuffix("-") / "disks/sbx_mask"
    assert disk.is_mount()
    assert f"{disk.stat().st_mode & 0o7777:o}" == "700"


def test_what_an_earlier_version_left_open_is_closed(tmp_path: Path) -> None:
    with a_small_agent(tmp_path / "state") as agent:
        run = RUN_ROOT / agent.prefix.removeprefix("ork").removesuffix("-")
        agent.stop()
        for path in (run, run / "disks", agent.state / "disks", agent.state / "snapshots"):
            path.chmod(0o755)
        agent.start()
        assert modes(agent)["disks"] == "700"
        assert modes(agent)[""] == "711"
        state = [
            f"{(agent.state / name).stat().st_mode & 0o777:o}" for name in ("disks", "snapshots")
        ]
        assert state == ["700", "700"]
