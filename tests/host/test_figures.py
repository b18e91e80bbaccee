"""What programs find out about the size of their machine: their sandbox's, whatever it does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hostruntime.wire.commands import Exec
from tests.host.agent import Agent, eventually, init_of
from tests.host.background import begin
from tests.host.client import HostClient
from tests.host.conftest import NewSandbox

pytestmark = pytest.mark.host

SIZE_MB = 512
# How many CPUs programs see by each way of asking, and the memory that free(1) tells of.
LOOK = """
nproc; getconf _NPROCESSORS_ONLN; grep -c ^processor /proc/cpuinfo; grep -c '^cpu[0-9]' /proc/stat
free -m | awk '/Mem/ {print $2}'; top -bn1 | grep -c '^ *1 root'
"""
BUSY = "head -c 200M /dev/zero > /workspace/file; while :; do :; done"
# The same writes have been seen to succeed on a file of one's own.
WRITE = "cat {0} > /tmp/own && echo x > /tmp/own && ! (echo x > {0}) 2> /dev/null && ! rm {0}"


def figure(agent: Agent, sandbox: str, name: str) -> str:
    """A file of /proc as the sandbox's own processes have it, read without any of them."""
    return Path(f"/proc/{init_of(agent, sandbox)}/root/proc/{name}").read_text()


def free_mb(agent: Agent, sandbox: str) -> int:
    found = re.search(r"MemFree: +(\d+) kB", figure(agent, sandbox, "meminfo"))
    assert found
    return int(found[1]) // 1024


def load(agent: Agent, sandbox: str) -> float:
    return float(figure(agent, sandbox, "loadavg").split()[0])


def used(agent: Agent, sandbox: str) -> int:
    """In ticks, by /proc/stat."""
    return sum(map(int, figure(agent, sandbox, "stat").split()[1:4]))


def test_a_sandbox_is_told_its_own_size_and_use_and_no_neighbours(
    agent: Agent, host: HostClient, new_sandbox: NewSandbox
) -> None:
    directory = Path("/run/orkestr") / str(host.health().instance) / "figures"
    others = set(directory.iterdir())
    busy, neighbour = (new_sandbox(cpu=1.0, memory_mb=SIZE_MB) for _ in range(2))
    for sandbox in (busy, neighbour):
        looked = host.exec(sandbox.id, Exec(LOOK)).stdout.split()
        assert list(map(int, looked)) == [1, 1, 1, 1, SIZE_MB, 1]
        assert free_mb(agent, sandbox.id) > SIZE_MB - 150
    for name in ("meminfo", "stat"):
        assert host.exec(neighbour.id, Exec(WRITE.format(f"/proc/{name}"))).code == 0
    begin(host, busy, BUSY)
    for _ in eventually():
        if free_mb(agent, busy.id) < SIZE_MB - 200 and load(agent, busy.id) > 0.3:
            break
    assert free_mb(agent, neighbour.id) > SIZE_MB - 150
    assert load(agent, neighbour.id) < load(agent, busy.id)
    # Who looks needs no agent, and the next one goes on where it was.
    agent.kill()
    before = used(agent, busy.id)
    assert figure(agent, busy.id, "meminfo").startswith("MemTotal:")
    agent.start()
    for _ in eventually():
        if used(agent, busy.id) > before:
            break
    assert load(agent, busy.id) > 0.2
    host.delete_sandbox(busy.id)
    host.delete_sandbox(neighbour.id)
    assert set(directory.iterdir()) <= others
