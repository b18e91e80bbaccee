"""How the host puts processes into containers: as LXC's own attach does, and leaving nothing."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest

from hostruntime.container.cgroups import cgroup_layout, pids_under
from hostruntime.host.rundir import RUN_ROOT
from hostruntime.wire.commands import Exec
from hostruntime.wire.sandboxes import SandboxInfo
from tests.host.agent import Agent, eventually, is_running
from tests.host.client import HostClient
from tests.host.conftest import NewSandbox

pytestmark = [pytest.mark.host, pytest.mark.pythons]

NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "pid_for_children", "user", "uts")
# Of /proc/<pid>/status (proc(5)): who the process is, and what it may do.
STATUS = (
    *("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"),
    *("NoNewPrivs", "Seccomp", "Seccomp_filters", "Umask", "Cpus_allowed", "Mems_allowed"),
)


def container_of(agent: Agent, sandbox: SandboxInfo) -> str:
    return f"{agent.prefix}{sandbox.id}"


def find(name: str, marker: str) -> int:
    """The host's pid of the process in a container that was started with ``sleep <marker>``."""
    group = cgroup_layout().container(name).unified
    for _ in eventually(20):
        for pid in pids_under(group):
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if words[:2] == [b"sleep", marker.encode()]:
                return pid
    raise AssertionError(marker)


@contextmanager
def entered_by_the_host(host: HostClient, sandbox: SandboxInfo, name: str) -> Iterator[int]:
    argv = ["sleep", "3061"]
    thread = Thread(target=lambda: host.exec(sandbox.id, Exec(argv, cwd="/", timeout_seconds=120)))
    thread.start()
    pid = find(name, "3061")
    try:
        yield pid
    finally:
        os.kill(pid, 9)
        thread.join()


@contextmanager
def entered_by_lxc(agent: Agent, name: str) -> Iterator[int]:
    lxcpath = RUN_ROOT / str(agent.client.health().instance) / "lxc"
    argv = ["lxc-attach", "-P", str(lxcpath), "-n", name, "--clear-env", "--", "sleep", "3062"]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, cwd="/") as process:
        pid = find(name, "3062")
        try:
            yield pid
        finally:
            os.kill(pid, 9)
            process.wait(20)


def facts(pid: int, name: str) -> dict[str, str]:
    """What confines a process, as the kernel tells the host."""
    proc = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    found = {key: status[key].strip() for key in STATUS if key in status}
    found |= {f"ns/{each}": str((proc / "ns" / each).readlink()) for each in NAMESPACES}
    found["levels"] = str(len(status["NSpid"].split()))
    for file in ("attr/current", "personality", "setgroups", "uid_map", "gid_map"):
        try:
            found[file] = (proc / file).read_text().strip()
        except OSError as error:
            found[file] = str(error.errno)
    found["root"] = str((proc / "root").readlink())
    # A command has a group of its own below the container's; where nothing limits it, it has none.
    unused = {path.name for path in cgroup_layout().unused()}
    for line in (proc / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        assert bool(path.partition(name)[1]) is (controllers not in unused), line
        found[f"cgroup {controllers}"] = path.partition(name)[0]
    return found


@pytest.mark.parametrize("network", ["off", "open"])
def test_a_process_is_confined_as_lxc_confines_it(
    agent: Agent, host: HostClient, new_sandbox: NewSandbox, network: str
) -> None:
    sandbox = new_sandbox(network=network)
    name = container_of(agent, sandbox)
    with entered_by_the_host(host, sandbox, name) as ours, entered_by_lxc(agent, name) as theirs:
        assert facts(ours, name) == facts(theirs, name)
        assert facts(ours, name)["Seccomp"] == "2"
        assert facts(ours, name)["levels"] == "2"


def test_what_moves_files_is_confined_like_a_command(
    agent: Agent, host: HostClient, sandbox: SandboxInfo
) -> None:
    """It is still a copy of the launcher, so nothing that an exec would have done was done."""
    name = container_of(agent, sandbox)
    with entered_by_the_host(host, sandbox, name) as pid:
        command = facts(pid, name)
    seen: dict[str, str] = {}

    def slowly() -> Iterator[bytes]:
        yield b"a"
        group = cgroup_layout().container(name).unified
        for _ in eventually(20):
            for pid in pids_under(group):
                if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"orkestr hostruntime"):
                    seen.update(facts(pid, name))
                    return

    assert host.write_file(sandbox.id, "/workspace/a", slowly()) == 1
    assert seen == command


def test_entering_leaves_nothing_in_the_launchers(
    agent: Agent, host: HostClient, new_sandbox: NewSandbox
) -> None:
    def descriptors() -> list[int]:
        return [len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in agent.children()]

    sandbox = new_sandbox()
    for _ in range(4):  # Until each launcher has been in there.
        host.exec(sandbox.id, Exec(["true"]))
        host.read_path(sandbox.id, "/etc/hostname")
    before = descriptors()
    for _ in range(60):
        host.exec(sandbox.id, Exec(["true"]))
        host.read_path(sandbox.id, "/etc/hostname")
    assert max(descriptors()) <= max(before) + 1, "the other launcher may only have come in now"
    host.delete_sandbox(sandbox.id)
    assert sum(descriptors()) <= sum(before)


def test_a_container_that_has_ended_is_not_entered(
    agent: Agent, host: HostClient, new_sandbox: NewSandbox
) -> None:
    """Not even when its init's pid has become somebody else's: a pidfd never does."""
    sandbox = new_sandbox()
    host.exec(sandbox.id, Exec(["true"]))
    init = cgroup_layout().container(container_of(agent, sandbox)).init_pid()
    assert init is not None
    os.kill(init, 9)
    for _ in eventually():
        if not is_running(init):
            break
    with pytest.raises(Exception, match=r"sandbox|running|ended"):
        host.exec(sandbox.id, Exec(["true"]))
