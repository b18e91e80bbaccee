"""Attacks on the launchers by how a process ends: they are the parents of tenants' commands."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from hostruntime.container.cgroups import cgroup_layout
from hostruntime.host.patience import process_tree
from hostruntime.wire.background import StartCommand
from hostruntime.wire.commands import Exec
from hostruntime.wire.sandboxes import SandboxInfo
from tests.host.agent import Agent, eventually
from tests.host.client import HostClient
from tests.host.conftest import NewSandbox
from tests.host.test_entering import container_of, find

pytestmark = pytest.mark.host

# Seizes what it is told of, and never waits for it: an ended tracee stays for its tracer.
_TRACER = """
import ctypes, os, platform, sys, time
libc = ctypes.CDLL(None, use_errno=True)
wanted = sys.argv[1].encode()
while True:
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = open(f"/proc/{pid}/cmdline", "rb").read().split(b"\\0")
        except OSError:
            continue
        if words[:2] == [b"sleep", wanted] and libc.ptrace(0x4206, int(pid), 0, 0) == 0:
            open("/workspace/held", "w").write(pid)
            time.sleep(600)
"""
# A child of this process's own parent, which is outside; it ends at once.
_SIBLINGS = """
import ctypes, os, signal
libc = ctypes.PyDLL(None)
number = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
me = os.getpid()
made = libc.syscall(number, 0x8000 | signal.SIGCHLD, 0, 0, 0, 0)
if os.getpid() != me:
    os._exit(7)
try:
    os.waitpid(made, 0)
    print("its own child")
except ChildProcessError:
    print("made", made)
"""
# Many of them, as quickly as the limit of processes lets it.
_MANY = 3000
_FLOOD = f"""
import ctypes, os, signal, time
libc = ctypes.PyDLL(None)
number = {{"x86_64": 56, "aarch64": 220}}[os.uname().machine]
me, made = os.getpid(), 0
while made < {_MANY}:
    if libc.syscall(number, 0x8000 | signal.SIGCHLD, 0, 0, 0, 0) < 0:
        time.sleep(0.001)
        continue
    if os.getpid() != me:
        os._exit(7)
    made += 1
print("made", made)
"""


@pytest.fixture
def hostile(new_sandbox: NewSandbox, attackers: str) -> SandboxInfo:
    return new_sandbox(image=attackers, network="off")


def zombies(agent: Agent) -> list[int]:
    """What has ended below the launchers, and their spawners, and that nobody has waited for."""
    found = []
    for launcher in agent.children():
        for pid in process_tree(launcher):
            with suppress(FileNotFoundError):
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
                found += [pid] if state == "Z" else []
    return found


@pytest.fixture
def untouched(agent: Agent) -> Iterator[None]:
    before = agent.children()
    yield
    assert agent.children() == before, "a launcher had to be replaced"


@pytest.mark.usefixtures("untouched")
def test_a_command_that_its_tracer_does_not_let_go_holds_up_nobody(
    agent: Agent, host: HostClient, hostile: SandboxInfo, sandbox: SandboxInfo
) -> None:
    held = ["sleep", "4.25"]
    with ThreadPoolExecutor(6) as pool:
        argv = ["python3", "-c", _TRACER, held[1]]
        tracing = pool.submit(host.exec, hostile.id, Exec(argv, timeout_seconds=60))
        holding = pool.submit(host.exec, hostile.id, Exec(held, timeout_seconds=60))
        pid = find(container_of(agent, hostile), held[1])
        for _ in eventually(30):
            if pid in zombies(agent):
                break
        # Several at once, so that both launchers have to do with it.
        others = [pool.submit(host.exec, sandbox.id, Exec(["echo", "on"])) for _ in range(12)]
        assert {other.result(20).stdout for other in others} == {b"on\n"}
        assert holding.result(20).code == 0
        assert pid in zombies(agent), "it was held all the while"
        assert not tracing.done()
        host.delete_sandbox(hostile.id)
    for _ in eventually(10):
        if pid not in zombies(agent):
            break


@pytest.mark.usefixtures("untouched")
def test_children_that_a_command_makes_the_launcher_have_do_not_keep_a_container(
    agent: Agent, host: HostClient, hostile: SandboxInfo
) -> None:
    for _ in range(4):
        result = host.exec(hostile.id, Exec(["python3", "-c", _SIBLINGS]))
        assert result.stdout.startswith(b"made "), result
    init = cgroup_layout().container(container_of(agent, hostile)).init_pid()
    host.delete_sandbox(hostile.id)
    for _ in eventually(10):
        if not Path(f"/proc/{init}").exists():
            break
    assert zombies(agent) == []


_TRACED = """
import ctypes, os, signal
ctypes.PyDLL(None).ptrace(0, 0, 0, 0)
print("traced", flush=True)
os.kill(os.getpid(), signal.SIGUSR1)
"""


def _in_background(host: HostClient, sandbox: SandboxInfo, script: str) -> str:
    """Start a script of Python's; the command's id."""
    command = f"exec python3 -c '{script}'"
    return host.start_command(sandbox.id, StartCommand("cmd_hostile", command)).id


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(("script", "printed"), [(_SIBLINGS, b"made "), (_FLOOD, b"made 3000")])
def test_children_that_a_background_command_makes_its_supervisor_have_are_reaped(
    agent: Agent, host: HostClient, hostile: SandboxInfo, script: str, printed: bytes
) -> None:
    name = _in_background(host, hostile, script)
    for _ in eventually():
        if not host.command(hostile.id, name).active:
            break
    assert host.command(hostile.id, name).code == 0
    assert host.command_output(hostile.id, name).data.startswith(printed)
    init = cgroup_layout().container(container_of(agent, hostile)).init_pid()
    host.delete_sandbox(hostile.id)
    for _ in eventually(10):
        if not Path(f"/proc/{init}").exists():
            break


def test_a_background_command_whose_supervisor_is_to_trace_it_can_be_killed(
    host: HostClient, hostile: SandboxInfo
) -> None:
    """It stops at its own signal, and its tracer never lets it go on."""
    name = _in_background(host, hostile, _TRACED)
    for _ in eventually():
        if host.command_output(hostile.id, name).data == b"traced\n":
            break
    assert host.kill_command(hostile.id, name).killed
    assert not host.command(hostile.id, name).active


def test_a_background_command_that_its_tracer_does_not_let_go_ends_all_the_same(
    agent: Agent, host: HostClient, hostile: SandboxInfo
) -> None:
    request = StartCommand("cmd_held", "exec sleep 4.75")
    host.start_command(hostile.id, request)
    with ThreadPoolExecutor(1) as pool:
        argv = ["python3", "-c", _TRACER, "4.75"]
        tracing = pool.submit(host.exec, hostile.id, Exec(argv, timeout_seconds=60))
        for _ in eventually(30):
            if not host.command(hostile.id, "cmd_held").running:
                break
        assert host.command(hostile.id, "cmd_held").code == 0
        assert host.stat(hostile.id, "/workspace/held").exists
        assert not tracing.done()
        host.delete_sandbox(hostile.id)


def _wakeups(agent: Agent) -> int:
    """How often the launchers have gone to sleep, and so woken up (proc(5), status)."""
    field = "voluntary_ctxt_switches:"
    lines = [
        line
        for launcher in agent.children()
        for line in Path(f"/proc/{launcher}/status").read_text().splitlines()
    ]
    return sum(int(line.removeprefix(field)) for line in lines if line.startswith(field))


@pytest.mark.usefixtures("untouched")
def test_a_flood_of_such_children_is_no_work_for_the_launchers(
    agent: Agent, host: HostClient, hostile: SandboxInfo
) -> None:
    before = _wakeups(agent)
    result = host.exec(hostile.id, Exec(["python3", "-c", _FLOOD], timeout_seconds=120))
    assert result.stdout == f"made {_MANY}\n".encode()
    for _ in eventually(10):
        if zombies(agent) == []:
            break
    assert _wakeups(agent) - before < _MANY / 10
