"""Taking an installation down: afterwards the host is as it was."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from hostruntime.wire.sandboxes import CreateSandbox
from tests.host.agent import (
    REPO,
    Agent,
    children_named,
    groups_named,
    instance_groups,
    mounts_below,
)
from tests.host.conftest import BASE
from tests.host.small import IMAGE, a_small_agent

pytestmark = pytest.mark.host


def everything(number: int) -> list[str]:
    """All that is named after an instance on this host."""
    prefix = f"ork{number}-"
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True).stdout
    addresses = subprocess.run(["ip", "-o", "address"], capture_output=True, text=True).stdout
    tables = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True).stdout
    run = Path("/run/orkestr") / str(number)
    return [
        *re.findall(rf"\b{prefix}\w+", links),
        *re.findall(rf"\b10\.{200 + number}\.\S+", addresses),
        *(line for line in tables.splitlines() if line.endswith(f"orkestr_{number}")),
        *groups_named(prefix),
        *map(str, instance_groups(f"ork{number}")),
        *mounts_below(run),
        *([str(run)] if run.exists() else []),
        *map(str, run.glob("*")),
        *children_named(prefix),
        *map(str, Path("/run/orkestr/instances").glob(str(number))),
    ]


def test_what_runs_on_a_deleted_state_directory_is_taken_down(tmp_path: Path) -> None:
    with a_small_agent(tmp_path / "deleted" / "state") as agent:
        number = agent.client.health().instance
        for name, network in (("sbx_lost1", "off"), ("sbx_lost2", "restricted")):
            agent.client.create_sandbox(
                CreateSandbox(name, image=IMAGE, cpu=1, memory_mb=64, network=network)
            )
        assert len(everything(number)) > 10
        shutil.rmtree(agent.state, ignore_errors=True)
        if agent.state.exists():
            agent.state.rename(tmp_path / "moved")
        agent.state.parent.rmdir()
        with pytest.raises(subprocess.CalledProcessError) as refused:
            take_down(agent)
        assert f"kill {agent.pid}`" in refused.value.stderr
        assert len(everything(number)) > 10
        agent.kill()
        take_down(agent)
        prefix, claim = f"ork{number}-sbx_lost", Path(f"/run/orkestr/instances/{number}")
        assert [*groups_named(prefix), *children_named(prefix)] == []
        # Unless somebody else on this machine has the number already.
        assert everything(number) == [] or claim.exists()
        assert not claim.exists() or claim.read_text().strip() != str(agent.state)
        assert not agent.state.parent.exists()
        take_down(agent)
        # What the fixture ends with.
        agent.state.mkdir(parents=True)


def take_down(agent: Agent) -> None:
    command = [*agent.command, "--state-dir", str(agent.state), "teardown"]
    subprocess.run(command, cwd=REPO, check=True, capture_output=True, text=True, timeout=600)


def test_after_a_teardown_nothing_is_left_but_images(agent: Agent) -> None:
    """Last on purpose: it takes the session's agent down and brings it up again."""
    number = agent.client.health().instance
    for name, network in (("sbx_down1", "off"), ("sbx_down2", "restricted"), ("sbx_down3", "open")):
        agent.client.create_sandbox(
            CreateSandbox(name, image=BASE, cpu=1, memory_mb=256, network=network)
        )
    assert len(everything(number)) > 10
    told = re.fullmatch(r"ended (\d+) of (\d+) containers", agent.tear_down().splitlines()[-1])
    assert told is not None
    assert int(told[1]) == int(told[2]) >= 3
    assert everything(number) == []
    assert [path.name for path in (agent.state / "sandboxes").iterdir()] == []
    agent.tear_down()
    agent.start()
    assert agent.client.image(BASE).kind == "base"
    assert agent.client.sandboxes() == []
