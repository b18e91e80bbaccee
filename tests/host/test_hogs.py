"""A tenant that takes all it can gets: its own limit, said clearly, and nobody else's share."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from hostruntime.container.cgroups import cgroup_layout, pids_under
from hostruntime.errors import ExecTimeout, HostError
from hostruntime.wire.commands import Exec, ExecResult
from hostruntime.wire.sandboxes import SandboxInfo
from tests.host.agent import Agent, eventually
from tests.host.client import HostClient
from tests.host.conftest import NewSandbox
from tests.host.hogs import HOGS

pytestmark = pytest.mark.host

SECONDS = 3.0
PIDS = 1024


class Hog(threading.Thread):
    """A hog at work in a sandbox, and what ended it."""

    def __init__(self, host: HostClient, sandbox: SandboxInfo, hog: str) -> None:
        super().__init__()
        self._host, self._sandbox, self._command = host, sandbox.id, HOGS[hog]
        self.ended_by: Exception | None = None
        self.result: ExecResult | None = None

    def run(self) -> None:
        try:
            self.result = self._host.exec(
                self._sandbox,
                Exec(self._command, timeout_seconds=SECONDS, max_output_bytes=1 << 20),
            )
        except HostError as error:
            self.ended_by = error


def processes(agent: Agent, sandbox: SandboxInfo) -> int:
    groups = cgroup_layout().container(f"{agent.prefix}{sandbox.id}")
    return len(pids_under(groups.unified))


def ask(host: HostClient, sandbox: SandboxInfo) -> None:
    assert host.exec(sandbox.id, Exec("echo fine > /root/x; cat /root/x")).stdout == b"fine\n"


def resident_mb(pid: int) -> int:
    line = next(x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmRSS" in x)
    return int(line.split()[1]) // 1024


@pytest.mark.parametrize("hog", HOGS)
def test_a_hog_is_stopped_whole_and_its_neighbour_never_notices(
    agent: Agent, host: HostClient, new_sandbox: NewSandbox, hog: str
) -> None:
    # Room for all the processes that there may be: were it out of memory first, the kernel would
    # choose what ends, the command itself perhaps, and what it left in the background would stay.
    memory = 2048 if hog == "fork bomb" else 256
    tenant, neighbour = new_sandbox(memory_mb=memory, disk_mb=256), new_sandbox()
    before, answered, most = resident_mb(agent.pid), 0, 0
    began = time.monotonic()
    ask(host, neighbour)
    calm = time.monotonic() - began
    at_work = Hog(host, tenant, hog)
    at_work.start()
    while at_work.is_alive():
        ask(host, neighbour)
        answered, most = answered + 1, max(most, processes(agent, tenant))
    assert isinstance(at_work.ended_by, ExecTimeout), (at_work.ended_by, at_work.result)
    assert answered >= min(10, SECONDS / calm / 4)
    assert most <= PIDS
    # Nothing of it is left, however it forked; the tenant can go on.
    for _ in eventually():
        if processes(agent, tenant) <= 1:
            break
    assert host.exec(tenant.id, Exec("rm -rf /root/*; echo again")).stdout == b"again\n"
    assert resident_mb(agent.pid) < before + 64


def test_running_out_of_processes_is_said_by_the_kernel(
    agent: Agent, host: HostClient, sandbox: SandboxInfo
) -> None:
    script = "i=0; while [ $i -lt 2000 ]; do sleep 60 & i=$((i+1)); done"
    result = host.exec(sandbox.id, Exec(["/bin/sh", "-c", script]))
    assert (result.code, b"Cannot fork" in result.stderr) == (2, True)
    assert processes(agent, sandbox) <= PIDS


def test_a_sandbox_without_a_process_to_spare_says_so(
    agent: Agent, host: HostClient, new_sandbox: NewSandbox
) -> None:
    """What goes wrong in there is the tenant's own, not a fault of the host's."""
    full = new_sandbox()
    # Unlike a shell, it goes on when it cannot fork: whatever ends makes room for nobody else.
    fill = "while (1) { $p = fork; if (defined $p) { if (!$p) { sleep 60; exit } } }"
    host.exec(full.id, Exec(f"perl -e '{fill}' >/dev/null 2>&1 &"))
    for _ in eventually():
        if processes(agent, full) >= PIDS:
            break
    refused: list[HostError] = []
    try:
        # What enters may be one too many; what that would start is always refused.
        result = host.exec(full.id, Exec(["/bin/sh", "-c", "/bin/true & wait"]))
        assert (result.code, b"Cannot fork" in result.stderr) == (2, True)
    except HostError as error:
        refused.append(error)
    for ask in (
        lambda: host.exec(full.id, Exec(["/bin/true"])),
        lambda: host.read_path(full.id, "/tmp"),
        lambda: host.write_file(full.id, "/tmp/x", b"x"),
    ):
        try:
            ask()
        except HostError as error:
            refused.append(error)
    assert all(error.status == 409 for error in refused), refused
    assert all("processes" in error.detail for error in refused)


def test_running_out_of_memory_is_told_apart(host: HostClient, new_sandbox: NewSandbox) -> None:
    result = host.exec(new_sandbox(memory_mb=64).id, Exec(["tail", "/dev/zero"]))
    assert (result.signal, result.out_of_memory) == (9, True)


def test_what_is_in_the_tmpfs_is_bounded_and_counts_as_memory(
    host: HostClient, new_sandbox: NewSandbox
) -> None:
    small = new_sandbox(memory_mb=64)
    for where in ("/workspace", "/tmp", "/dev/shm"):
        said = host.exec(
            small.id, Exec(f"dd if=/dev/zero of={where}/f bs=1M count=200 2>&1; rm {where}/f")
        )
        assert b"No space left on device" in said.stdout


def test_a_share_of_the_cpu_is_a_share(
    agent: Agent, host: HostClient, new_sandbox: NewSandbox
) -> None:
    half = new_sandbox(cpu=0.5)
    groups = cgroup_layout().container(f"{agent.prefix}{half.id}")
    before, began = groups.cpu_us(), time.monotonic()
    with pytest.raises(ExecTimeout):
        host.exec(half.id, Exec(HOGS["CPU spinner"], timeout_seconds=SECONDS))
    used, passed = (groups.cpu_us() - before) / 1e6, time.monotonic() - began
    assert 0.2 < used < passed * 0.5 * 1.3
