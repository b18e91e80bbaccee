"""The processes that start commands from inside: what they are, and what becomes of them."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from hostruntime.container.cgroups import cgroup_layout, freeze_group, pids_in, pids_under
from hostruntime.errors import HostError
from hostruntime.host.patience import process_tree
from hostruntime.wire.commands import Exec
from hostruntime.wire.sandboxes import SandboxInfo
from tests.host.agent import Agent, eventually, is_running
from tests.host.client import HostClient
from tests.host.commands import Command
from tests.host.conftest import NewSandbox
from tests.host.test_entering import container_of, entered_by_the_host, facts
from tests.processes import open_files

pytestmark = [pytest.mark.host, pytest.mark.pythons]

ENTERED = ("cgroup", "ipc", "mnt", "net", "pid_for_children", "user", "uts")
MAX_PRIVATE_KIB = 3 * 1024
MANY = 2000
TITLE = b"orkestr hostruntime.container.spawner"


def spawners(agent: Agent) -> list[int]:
    """What the launchers have inside containers."""
    found = []
    for launcher in agent.children():
        for pid in process_tree(launcher):
            if pid != launcher and Path(f"/proc/{pid}/cmdline").read_bytes().startswith(TITLE):
                found.append(pid)
    return found


def spawner_of(agent: Agent, host: HostClient, sandbox: SandboxInfo) -> int:
    """A sandbox's spawner, which it has after a command; it waits in the host's own groups."""
    assert host.exec(sandbox.id, Exec(["true"])).code == 0
    namespace = link(init(agent, sandbox), "ns/user")
    mine = [pid for pid in spawners(agent) if link(pid, "ns/user") == namespace]
    (pid,) = mine
    return pid


def init(agent: Agent, sandbox: SandboxInfo) -> int:
    found = cgroup_layout().container(container_of(agent, sandbox)).init_pid()
    assert found is not None
    return found


def link(pid: int | str, name: str) -> str:
    """Where one of a process's links in proc(5) leads to."""
    return str(Path(f"/proc/{pid}/{name}").readlink())


def fields(pid: int, file: str = "status") -> dict[str, str]:
    lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


# What one is -------------------------------------------------------------------------------------


def test_a_spawner_is_confined_as_a_command_is(
    agent: Agent, host: HostClient, sandbox: SandboxInfo
) -> None:
    pid = spawner_of(agent, host, sandbox)
    with entered_by_the_host(host, sandbox, container_of(agent, sandbox)) as command:
        wanted = facts(command, container_of(agent, sandbox))
    differing = ("ns/pid", "levels", "root", "cgroup")
    status = fields(pid)
    for key, value in wanted.items():
        if key in status:
            assert status[key] == value, key
        elif key.startswith("ns/") and not key.startswith(differing):
            assert link(pid, key) == value
    assert (status["Seccomp"], status["Seccomp_filters"]) == ("2", "1")
    assert wanted["CapEff"] == status["CapEff"]


def test_nobody_inside_can_see_a_spawner(
    agent: Agent, host: HostClient, sandbox: SandboxInfo
) -> None:
    pid = spawner_of(agent, host, sandbox)
    seen = host.exec(sandbox.id, Exec("cat /proc/[0-9]*/cmdline; ls -d /proc/[0-9]*")).stdout
    assert b"orkestr hostruntime" not in seen
    # Its own pid namespace is the host's: there is no number for it inside.
    assert fields(pid)["NSpid"] == str(pid)
    # Not even by killing everything that there is.
    host.exec(sandbox.id, Exec("kill -9 -1"))
    assert spawner_of(agent, host, sandbox) == pid


def test_a_spawner_holds_nothing_of_the_hosts(
    agent: Agent, host: HostClient, sandbox: SandboxInfo
) -> None:
    pid = spawner_of(agent, host, sandbox)
    held = sorted(each.partition("[")[0] for each in open_files(pid))
    assert held == ["/dev/null", "/dev/null", "/dev/null", "anon_inode:", "socket:"]
    assert link(pid, "cwd") == "/"


def test_a_spawner_is_charged_to_nobody_and_costs_little(
    agent: Agent, host: HostClient, sandbox: SandboxInfo
) -> None:
    pid = spawner_of(agent, host, sandbox)
    launcher = int(fields(pid)["PPid"])
    groups = cgroup_layout().container(container_of(agent, sandbox))
    assert pids_under(groups.unified) == [init(agent, sandbox)]
    assert Path(f"/proc/{pid}/cgroup").read_text() == Path(f"/proc/{launcher}/cgroup").read_text()
    memory = fields(pid, "smaps_rollup")
    private = sum(int(memory[key].split()[0]) for key in ("Private_Dirty", "Private_Clean"))
    assert private + int(fields(pid)["VmPTE"].split()[0]) < MAX_PRIVATE_KIB
    # It waits without a timer.
    used = Path(f"/proc/{pid}/schedstat").read_text()
    time.sleep(1)
    assert Path(f"/proc/{pid}/schedstat").read_text() == used


# What it costs to start a command ----------------------------------------------------------------


def test_a_command_is_one_process_and_leaves_nothing(
    agent: Agent, host: HostClient, sandbox: SandboxInfo
) -> None:
    """The launcher forks nothing for it, and neither it nor the agent holds anything afterwards."""

    def held() -> list[int]:
        return [len(list(Path(f"/proc/{p}/fd").iterdir())) for p in (agent.pid, launcher, pid)]

    def reaped(process: int) -> int:
        """The page faults of all children that a process has waited for (cminflt in proc(5))."""
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[8])

    pid = spawner_of(agent, host, sandbox)
    launcher = int(fields(pid)["PPid"])
    host.exec(sandbox.id, Exec(["true"]))
    first, before, faults = _pid_inside(host, sandbox), held(), reaped(launcher)
    for _ in range(MANY):
        assert host.exec(sandbox.id, Exec(["true"])).code == 0
    assert _pid_inside(host, sandbox) == first + MANY + 1
    assert reaped(launcher) == faults
    # Other work of the agent opens a file now and then.
    for _ in eventually():
        if all(now < then + MANY // 2 for now, then in zip(held(), before, strict=True)):
            break
    assert spawners(agent).count(pid) == 1


def _pid_inside(host: HostClient, sandbox: SandboxInfo) -> int:
    return int(host.exec(sandbox.id, Exec(["sh", "-c", "echo $$"])).stdout)


def test_commands_at_once_share_one_spawner(
    agent: Agent, host: HostClient, sandbox: SandboxInfo
) -> None:
    pid = spawner_of(agent, host, sandbox)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda n: host.exec(sandbox.id, Exec(f"echo {n}")), range(40)))
    assert [result.stdout for result in results] == [f"{n}\n".encode() for n in range(40)]
    assert spawner_of(agent, host, sandbox) == pid


def test_the_first_command_finds_its_spawner_there(
    agent: Agent, host: HostClient, new_sandbox: NewSandbox
) -> None:
    sandbox = new_sandbox()
    namespace = link(init(agent, sandbox), "ns/user")
    for _ in eventually():
        prepared = [pid for pid in spawners(agent) if link(pid, "ns/user") == namespace]
        if prepared:
            break
    assert spawner_of(agent, host, sandbox) == prepared[0]


# When something goes wrong -----------------------------------------------------------------------


def test_a_spawner_that_dies_takes_its_commands_with_it_and_is_replaced(
    agent: Agent, host: HostClient, sandbox: SandboxInfo, new_sandbox: NewSandbox
) -> None:
    """Its commands could no longer be observed; those of other sandboxes are untouched."""
    other = new_sandbox()
    pid = spawner_of(agent, host, sandbox)
    running = Command(host, sandbox.id, "sleep 30.75")
    neighbour = Command(host, other.id, "sleep 1; echo on")
    os.kill(pid, signal.SIGKILL)
    running.join(20)
    assert running.result is not None
    assert (running.result.code, running.result.signal) == (137, 9)
    assert spawner_of(agent, host, sandbox) != pid
    neighbour.join(20)
    assert neighbour.result is not None
    assert neighbour.result.stdout == b"on\n"


def test_an_idle_spawner_that_was_killed_is_not_missed(
    agent: Agent, host: HostClient, sandbox: SandboxInfo
) -> None:
    for _ in range(3):
        pid = spawner_of(agent, host, sandbox)
        os.kill(pid, signal.SIGKILL)
        for _ in eventually():
            if not is_running(pid):
                break
        assert host.exec(sandbox.id, Exec("echo on")).stdout == b"on\n"


def test_a_spawner_that_hangs_holds_up_nobody_else(
    agent: Agent, host: HostClient, sandbox: SandboxInfo, new_sandbox: NewSandbox
) -> None:
    """Whatever is handed to it may have run, so it is reported, and never started again."""
    pid, launchers = spawner_of(agent, host, sandbox), agent.children()
    others = [new_sandbox() for _ in range(3)]
    os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor(4) as pool:
        handed = pool.submit(host.exec, sandbox.id, Exec("echo x >>/workspace/ran"))
        time.sleep(0.2)
        begun = time.monotonic()
        results = [pool.submit(host.exec, each.id, Exec("echo on")) for each in others]
        assert [each.result(30).stdout for each in results] == [b"on\n"] * 3
        assert host.exec(sandbox.id, Exec("echo by itself")).stdout == b"by itself\n"
        assert not handed.done()
        assert time.monotonic() < begun + 12, "nobody has waited until it was given up"
        with pytest.raises(HostError, match="process"):
            handed.result(60)
    assert not is_running(pid)
    assert host.exec(sandbox.id, Exec("cat /workspace/ran")).stdout == b""
    assert agent.children() == launchers


def test_a_command_stopped_before_it_is_one_is_ended_at_its_time_limit(
    agent: Agent, host: HostClient, sandbox: SandboxInfo
) -> None:
    """Root inside may stop it between clone and execve, and with it the spawner (vfork(2))."""
    pid, launchers = spawner_of(agent, host, sandbox), agent.children()
    stop = threading.Event()
    stopped: list[int] = []
    thread = threading.Thread(target=_stop_nascent, args=(pid, stop, stopped))
    thread.start()
    try:
        for _ in range(400):
            try:
                host.exec(sandbox.id, Exec(["true"], timeout_seconds=3))
            except HostError as error:
                assert "timeout" in str(error)
            if stopped:
                break
    finally:
        stop.set()
        thread.join()
    assert stopped, "none was caught in time"
    assert not is_running(stopped[0])
    assert spawner_of(agent, host, sandbox) == pid, "it goes on"
    assert agent.children() == launchers


def _stop_nascent(spawner: int, stop: threading.Event, stopped: list[int]) -> None:
    """Stop a child of a spawner that still runs the spawner's program."""
    own = link(spawner, "exe")
    while not stop.is_set() and not stopped:
        for child in Path(f"/proc/{spawner}/task/{spawner}/children").read_text().split():
            with suppress(OSError):
                if link(child, "exe") == own and _is_stopped_in(int(child), own):
                    stopped.append(int(child))
                    return


def _is_stopped_in(pid: int, program: str) -> bool:
    """Stop a process; let it go on unless it has stopped while it still runs a program."""
    os.kill(pid, signal.SIGSTOP)
    while (state := fields(pid)["State"][0]) not in "TZX":
        time.sleep(0)
    if state == "T" and link(pid, "exe") == program:
        return True
    os.kill(pid, signal.SIGCONT)
    return False


def test_a_sandbox_at_its_process_limit_can_still_be_helped(
    agent: Agent, host: HostClient, sandbox: SandboxInfo
) -> None:
    """A spawner cannot start anything then (EAGAIN in clone(2)); the launcher can."""
    name = container_of(agent, sandbox)
    layout = cgroup_layout()
    group = layout.pids_group(name) / name
    host.exec(sandbox.id, Exec("for i in $(seq 20); do sleep 40.5 & done >/dev/null 2>&1"))
    limit = group / "pids.max"
    before = limit.read_text()
    limit.write_text((group / "pids.current").read_text())
    try:
        assert host.exec(sandbox.id, Exec(["echo", "on"])).stdout == b"on\n"
        assert host.exec(sandbox.id, Exec(["pkill", "-f", "40.5"], cwd="/")).code in {0, 127}
    finally:
        limit.write_text(before)


def test_a_command_that_is_its_parents_tracee_is_reported_when_it_ends(
    host: HostClient, new_sandbox: NewSandbox, attackers: str
) -> None:
    """PTRACE_TRACEME: its parent is then told of each of its stops, too (ptrace(2))."""
    sandbox = new_sandbox(image=attackers)
    script = (
        "import ctypes, os, signal, threading, time\n"
        "libc = ctypes.CDLL(None)\n"
        "pid = os.fork()\n"
        "if pid:\n"
        "    print(libc.ptrace(0, 0, 0, 0), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGUSR1)\n"
        "time.sleep(0.5)\n"
        "os.kill(os.getppid(), signal.SIGKILL)\n"
    )
    result = host.exec(sandbox.id, Exec(["python3", "-c", script], timeout_seconds=20))
    assert (result.stdout, result.code) == (b"0\n", 137)


# When it ends ------------------------------------------------------------------------------------


def test_a_spawner_ends_with_its_sandbox(
    agent: Agent, host: HostClient, new_sandbox: NewSandbox
) -> None:
    sandbox = new_sandbox()
    pid = spawner_of(agent, host, sandbox)
    host.delete_sandbox(sandbox.id)
    assert not is_running(pid)


def test_a_spawner_ends_with_its_launcher(
    agent: Agent, host: HostClient, sandbox: SandboxInfo
) -> None:
    pid = spawner_of(agent, host, sandbox)
    os.kill(int(fields(pid)["PPid"]), signal.SIGKILL)
    for _ in eventually():
        if not is_running(pid):
            break
    assert spawner_of(agent, host, sandbox) != pid


def test_a_spawner_is_none_of_what_a_freeze_waits_for(
    agent: Agent, host: HostClient, sandbox: SandboxInfo
) -> None:
    pid = spawner_of(agent, host, sandbox)
    group = cgroup_layout().container(container_of(agent, sandbox)).unified
    freeze_group(group, frozen=True)
    try:
        assert pid not in pids_in(group)
        assert fields(pid)["State"].startswith("S")
    finally:
        freeze_group(group, frozen=False)
    assert spawner_of(agent, host, sandbox) == pid
