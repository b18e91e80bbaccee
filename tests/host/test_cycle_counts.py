"""What the agent does to make a sandbox out of a warm container, delete it, and start the next."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostruntime.container.cgroups import cgroup_layout, is_frozen
from hostruntime.wire.sandboxes import CreateSandbox
from tests.host.agent import Agent, eventually
from tests.host.conftest import BASE
from tests.host.counted import counting
from tests.host.warm import keeping_warm

pytestmark = pytest.mark.host

CYCLES = 10
# For one sandbox.  Beside these there is what happens from time to time.
MOST = {"uses of threads": 20, "threads started": 3, "programs": 0, "files opened": 60}


def test_a_sandbox_takes_so_much_work_and_no_more(agent: Agent, tmp_path: Path) -> None:
    with keeping_warm(agent, 1), counting(agent, tmp_path / "counts") as numbers:
        prefix = agent.prefix
        use_one(agent, prefix, 0)
        before = numbers()
        for number in range(1, CYCLES + 1):
            use_one(agent, prefix, number)
        counted = numbers()
    per_sandbox = {what: (counted[what] - before[what]) / CYCLES for what in MOST}
    assert {what: n for what, n in per_sandbox.items() if n > MOST[what]} == {}, per_sandbox


def use_one(agent: Agent, prefix: str, number: int) -> None:
    sandbox = CreateSandbox(
        f"sbx_counted{number}", image=BASE, cpu=0.5, memory_mb=256, network="off"
    )
    agent.client.create_sandbox(sandbox)
    agent.client.delete_sandbox(sandbox.id)
    for _ in eventually():
        # Without asking the agent, which would be counted.
        names = [f"{prefix}{path.name}" for path in (agent.state / "warm").iterdir()]
        if any(is_frozen(cgroup_layout().container(name).unified) for name in names):
            return
