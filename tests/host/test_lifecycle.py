"""Sandboxes from creation to their end, and what an agent finds when it starts."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from hostruntime.errors import ContainerGone, HostError, ImageNotFound, InvalidRequest, NotFound
from hostruntime.wire.commands import Exec
from hostruntime.wire.sandboxes import CreateSandbox, SandboxInfo
from tests.host.agent import (
    Agent,
    children_named,
    eventually,
    groups_named,
    init_of,
    is_running,
    mounts_below,
)
from tests.host.client import HostClient
from tests.host.commands import Command
from tests.host.conftest import BASE, NewSandbox
from tests.processes import command_lines, open_files

pytestmark = [pytest.mark.host, pytest.mark.pythons]

RUN = Path("/run/orkestr")


def traces(agent: Agent, prefix: str, sandbox_id: str) -> list[str]:
    """What there is of a sandbox on the host."""
    name, number = f"{prefix}{sandbox_id}", prefix.removeprefix("ork").rstrip("-")
    records = RUN / number / "slots"
    return [
        *groups_named(name),
        *mounts_below(RUN / number / "roots" / name),
        *map(str, (RUN / number / "roots").glob(name)),
        *map(str, (RUN / number / "disks").glob(sandbox_id)),
        *map(str, (agent.state / "disks").glob(f"{sandbox_id}*")),
        *map(str, (agent.state / "sandboxes").glob(sandbox_id)),
        *(str(path) for path in records.glob("*.json") if sandbox_id in path.read_text()),
        *children_named(name),
        *map(str, (agent.state / "images").glob(f"*/users/{sandbox_id}")),
    ]


# Create, end ------------------------------------------------------------------------------------


def test_a_sandbox_starts_once_for_an_id(host: HostClient, new_sandbox: NewSandbox) -> None:
    first = new_sandbox(network="off")
    again = host.create_sandbox(CreateSandbox(first.id, image=BASE, cpu=1, memory_mb=512))
    assert again == first == host.sandbox(first.id)
    assert first.state == "running"
    assert [s.id for s in host.sandboxes()].count(first.id) == 1


def test_two_at_once_with_one_id_make_one(host: HostClient, new_sandbox: NewSandbox) -> None:
    first = new_sandbox()
    host.delete_sandbox(first.id)
    answers: list[SandboxInfo] = []

    def create() -> None:
        answers.append(
            host.create_sandbox(CreateSandbox(first.id, image=BASE, cpu=1, memory_mb=512))
        )

    threads = [threading.Thread(target=create) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 3
    assert len({answer.started_at for answer in answers}) == 1


def test_terminating_leaves_nothing_and_may_be_repeated(
    agent: Agent, host: HostClient, sandbox: SandboxInfo
) -> None:
    prefix = agent.prefix
    host.exec(sandbox.id, Exec("sleep 400 & echo x > /root/kept-nowhere"))
    assert traces(agent, prefix, sandbox.id)
    host.delete_sandbox(sandbox.id)
    host.delete_sandbox(sandbox.id)
    assert traces(agent, prefix, sandbox.id) == []
    with pytest.raises(NotFound):
        host.sandbox(sandbox.id)


@pytest.mark.parametrize(
    ("wishes", "error"),
    [
        ({"image": "img_nowhere"}, ImageNotFound),
        ({"image": "../../etc"}, ImageNotFound),
        ({"network": "wide"}, InvalidRequest),
        ({"network": "off", "allow_domains": ["example.org"]}, InvalidRequest),
        ({"network": "restricted", "allow_domains": ["not a domain"]}, InvalidRequest),
        ({"memory_mb": 1}, InvalidRequest),
        ({"cpu": 0.0}, InvalidRequest),
        ({"env": {"A=B": "x"}}, InvalidRequest),
    ],
)
def test_a_bad_request_creates_nothing(
    agent: Agent,
    host: HostClient,
    new_sandbox: NewSandbox,
    wishes: dict[str, object],
    error: type[HostError],
) -> None:
    before = {s.id for s in host.sandboxes()}
    with pytest.raises(error):
        new_sandbox(**wishes)
    assert {s.id for s in host.sandboxes()} == before
    assert {path.name for path in (agent.state / "sandboxes").iterdir()} == before


@pytest.mark.parametrize("name", ["../escape", "a/b", "", ".", "a" * 65])
def test_an_id_that_is_no_plain_name_is_refused(host: HostClient, name: str) -> None:
    with pytest.raises(InvalidRequest):
        host.create_sandbox(CreateSandbox(name, image=BASE, cpu=1, memory_mb=512))


def test_limits_hold(host: HostClient, new_sandbox: NewSandbox) -> None:
    sandbox = new_sandbox(cpu=0.5, memory_mb=200)
    spaces = host.exec(
        sandbox.id, Exec("df --output=size -m /workspace /tmp | tail -n 2")
    ).stdout.split()
    assert spaces == [b"150", b"100"]
    busy = "t=$((SECONDS+1)); while [ $SECONDS -le $t ]; do :; done; times | head -n 1"
    user = host.exec(sandbox.id, Exec(busy)).stdout.split()[0].decode()
    seconds = float(user.partition("m")[2].rstrip("s"))
    assert seconds < 1.4, "two seconds at half a processor"


def test_the_root_file_system_is_the_images_and_the_writes_are_the_sandboxes(
    agent: Agent, host: HostClient, new_sandbox: NewSandbox
) -> None:
    one, other = new_sandbox(), new_sandbox()
    host.exec(one.id, Exec("echo one > /etc/mine; rm /etc/debian_version; chown 1234 /etc/issue"))
    assert host.exec(other.id, Exec("ls /etc/mine; cat /etc/debian_version")).stdout.startswith(
        b"12"
    )
    tree = next((agent.state / "images").glob(f"{BASE}@*")) / "tree"
    assert (tree / "etc/debian_version").exists()
    assert not (tree / "etc/mine").exists()
    assert (tree / "etc/issue").stat().st_uid == 0


def test_the_hosts_ids_are_nobodys(host: HostClient, sandbox: SandboxInfo) -> None:
    uid_map = host.exec(sandbox.id, Exec(["cat", "/proc/self/uid_map"])).stdout.split()
    assert uid_map[0] == b"0"
    assert int(uid_map[1]) >= 1_000_000_000
    assert uid_map[2] == b"65536"


@pytest.mark.parametrize(
    "command",
    [
        "mount -t tmpfs none /mnt",
        "mknod /root/disk b 8 0",
        "echo c > /proc/sysrq-trigger",
        "echo x > /proc/sys/kernel/core_pattern",
        "mount -o remount,rw /sys",
        "ls /sys/fs/cgroup/* | grep .",
        "hostname changed-by-nobody && false",
        "dmesg --clear",
    ],
)
def test_root_inside_has_no_power_outside(
    host: HostClient, sandbox: SandboxInfo, command: str
) -> None:
    assert host.exec(sandbox.id, Exec(command)).code != 0


# Deadlines --------------------------------------------------------------------------------------


def test_a_deadline_ends_a_sandbox(agent: Agent, host: HostClient, new_sandbox: NewSandbox) -> None:
    prefix = agent.prefix
    sandbox = new_sandbox()
    host.exec(sandbox.id, Exec("sleep 401 & true"))
    sandbox = host.set_deadline(sandbox.id, time.time() + 0.7)
    for _ in eventually():
        if host.sandbox(sandbox.id).state == "gone":
            break
    found = host.sandbox(sandbox.id)
    assert found.reason == "expired"
    assert found.ended_at is not None
    assert sandbox.deadline is not None
    assert 0 <= found.ended_at - sandbox.deadline < 10
    with pytest.raises(ContainerGone):
        host.exec(sandbox.id, Exec("true"))
    with pytest.raises(ContainerGone):
        host.read_path(sandbox.id, "/etc/hostname")
    left = traces(agent, prefix, sandbox.id)
    assert left == [str(agent.state / "sandboxes" / sandbox.id)], "only the record"


def test_a_deadline_can_be_moved_and_taken_away(host: HostClient, new_sandbox: NewSandbox) -> None:
    sandbox, other = new_sandbox(), new_sandbox()
    soon = time.time() + 1.5
    for one in (sandbox, other):
        host.set_deadline(one.id, soon)
    host.set_deadline(sandbox.id, time.time() + 1000)
    for _ in eventually():
        if host.sandbox(other.id).state == "gone":
            break
    assert host.sandbox(sandbox.id).state == "running"
    assert host.set_deadline(sandbox.id, None).deadline is None
    host.set_deadline(sandbox.id, time.time() - 5)
    for _ in eventually():
        if host.sandbox(sandbox.id).state == "gone":
            break
    with pytest.raises(ContainerGone):
        host.set_deadline(sandbox.id, time.time() + 100)


def test_a_sandbox_whose_init_dies_is_gone_and_cleared_away(
    agent: Agent, host: HostClient, new_sandbox: NewSandbox
) -> None:
    prefix, sandbox = agent.prefix, new_sandbox()
    os.kill(init_of(agent, sandbox.id), signal.SIGKILL)
    for _ in eventually():
        if host.sandbox(sandbox.id).state == "gone":
            break
    assert host.sandbox(sandbox.id).reason == "exited"
    assert traces(agent, prefix, sandbox.id) == [str(agent.state / "sandboxes" / sandbox.id)]
    host.delete_sandbox(sandbox.id)
    assert traces(agent, prefix, sandbox.id) == []


# The agent's own life ---------------------------------------------------------------------------


@pytest.fixture
def restarted(agent: Agent) -> Iterator[Agent]:
    """An agent a test may do anything to: it runs again afterwards."""
    yield agent
    if agent.process is None or agent.process.poll() is not None:
        agent.start()


def test_sandboxes_survive_a_restart_of_the_agent(
    restarted: Agent, host: HostClient, new_sandbox: NewSandbox
) -> None:
    sandbox = new_sandbox(env={"KEPT": "yes"}, deadline=time.time() + 300, network="open")
    host.exec(sandbox.id, Exec("echo data > /workspace/f; sleep 402 & true"))
    restarted.stop()
    assert init_of_is_alive(sandbox)
    restarted.start()
    assert host.sandbox(sandbox.id) == sandbox
    found = host.exec(
        sandbox.id, Exec("cat /workspace/f; echo $KEPT; cat /proc/*/comm | grep sleep")
    )
    assert found.stdout == b"data\nyes\nsleep\n"
    host.set_deadline(sandbox.id, time.time())
    for _ in eventually():
        if host.sandbox(sandbox.id).state == "gone":
            break


def init_of_is_alive(sandbox: SandboxInfo) -> bool:
    return any(sandbox.id in line for line in children_named("ork"))


def test_sandboxes_survive_the_agents_sudden_death_and_its_commands_do_not(
    restarted: Agent, host: HostClient, new_sandbox: NewSandbox
) -> None:
    sandbox = new_sandbox()
    command = Command(host, sandbox.id, "sleep 403 & sleep 404")
    restarted.kill()
    command.join()
    restarted.start()
    for _ in eventually():
        names = host.exec(sandbox.id, Exec(["sh", "-c", "cat /proc/*/comm"])).stdout
        if b"sleep" not in names:
            break
    assert host.sandbox(sandbox.id).state == "running"


def test_stopping_the_agent_ends_running_commands_in_time(
    restarted: Agent, host: HostClient, new_sandbox: NewSandbox
) -> None:
    command = Command(host, new_sandbox().id, "trap '' TERM; while :; do sleep 1; done")
    restarted.stop()
    command.join(30)
    assert not command.is_alive()


@pytest.mark.parametrize("delay", [0.002, 0.012, 0.022, 0.04])
def test_a_sandbox_half_started_when_the_agent_was_killed_is_no_more(
    restarted: Agent, host: HostClient, delay: float
) -> None:
    prefix, name = restarted.prefix, f"sbx_half{int(delay * 1000)}"

    def create() -> None:
        with suppress(HostError):
            host.create_sandbox(
                CreateSandbox(name, image=BASE, cpu=1, memory_mb=256, network="open")
            )

    thread = threading.Thread(target=create)
    thread.start()
    time.sleep(delay)
    restarted.kill()
    thread.join()
    restarted.start()
    alive = [s for s in host.sandboxes() if s.id == name]
    if alive:  # It was whole, and recorded, before the kill.
        assert host.exec(name, Exec("echo whole")).stdout == b"whole\n"
        host.delete_sandbox(name)
    assert traces(restarted, prefix, name) == []


def test_a_launcher_that_dies_is_replaced(
    agent: Agent, host: HostClient, new_sandbox: NewSandbox
) -> None:
    sandbox = new_sandbox()
    for pid in agent.children():
        if "hostruntime.container.lxc" in command_lines().get(pid, ""):
            os.kill(pid, signal.SIGKILL)
    for _ in eventually():
        with suppress(HostError):
            if host.exec(sandbox.id, Exec("echo on")).stdout == b"on\n":
                break
    assert new_sandbox().state == "running"


def test_containers_hold_nothing_of_the_agent(
    agent: Agent, host: HostClient, sandbox: SandboxInfo
) -> None:
    """A monitor or init that kept the agent's socket or lock would outlive and block it."""
    init = init_of(agent, sandbox.id)
    monitor = int(Path(f"/proc/{init}/stat").read_text().rpartition(")")[2].split()[1])
    for pid in (init, monitor):
        assert is_running(pid)
        ours = [target for target in open_files(pid) if str(agent.state) in target]
        assert [target for target in ours if not target.endswith("lxc.log")] == []


def test_a_second_agent_on_the_same_directory_is_refused(agent: Agent) -> None:
    refused = agent.second()
    assert refused.returncode == 1
    assert f"pid {agent.pid}" in refused.stderr
    assert agent.client.health().state_dir == str(agent.state)
