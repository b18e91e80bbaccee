"""What the agent does to make a sandbox out of a warm container, delete it, and start the next.

And what it does to take a snapshot of one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest

from hostruntime.container.cgroups import cgroup_layout, is_frozen
from hostruntime.wire.commands import Exec
from hostruntime.wire.sandboxes import CreateSandbox
from tests.host.agent import Agent, eventually
from tests.host.conftest import BASE
from tests.host.counted import counting
from tests.host.warm import keeping_warm

pytestmark = pytest.mark.host

CYCLES = 10
# For one sandbox.
MOST = {"uses of threads": 20, "threads started": 3, "programs": 0, "files opened": 60}
# For one snapshot.  To flush: what is written before and while it stands still, each file of the
# snapshot and its directory, and the directory above.
SNAPSHOT = {"programs": 0, "flushes": 8, "uses of threads": 20, "files opened": 45}


def test_a_sandbox_and_a_snapshot_take_so_much_work_and_no_more(
    agent: Agent, tmp_path: Path
) -> None:
    with keeping_warm(agent, 1), counting(agent, tmp_path / "counts") as numbers:
        prefix = agent.prefix
        use_one(agent, prefix, 0)
        found = [numbers()]
        for number in range(1, CYCLES + 1):
            use_one(agent, prefix, number)
            found.append(numbers())
        snapshots = counts_of_snapshots(agent, numbers)
    assert above(MOST, found) == {}
    assert above(SNAPSHOT, snapshots) == {}


def above(most: dict[str, int], found: list[Counter[str]]) -> dict[str, list[int]]:
    """What most rounds took too much of, with what each took.

    Most, as there is what happens from time to time, more often in a round on a slow machine.
    """
    taken = {
        what: [after[what] - before[what] for before, after in pairwise(found)] for what in most
    }
    return {what: each for what, each in taken.items() if median(each) > most[what]}


def counts_of_snapshots(agent: Agent, numbers: Callable[[], Counter[str]]) -> list[Counter[str]]:
    """The numbers before and after each snapshot of a sandbox that has written a little."""
    sandbox = CreateSandbox("sbx_kept", image=BASE, cpu=0.5, memory_mb=256, network="off")
    agent.client.create_sandbox(sandbox)
    names = [f"snap_counted{number}" for number in range(CYCLES)]
    try:
        assert (
            agent.client.exec(sandbox.id, Exec("echo x >/root/x; echo x >/workspace/x")).code == 0
        )
        found = [numbers()]
        for name in names:
            agent.client.create_snapshot(name, sandbox.id)
            found.append(numbers())
    finally:
        for name in names:
            agent.client.delete_snapshot(name)
        agent.client.delete_sandbox(sandbox.id)
    return found


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
