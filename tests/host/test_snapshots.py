"""Snapshots of running sandboxes, on real LXC."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest

from hostruntime.container.cgroups import cgroup_layout, is_frozen
from hostruntime.errors import ContainerGone, HostError, InvalidRequest, NotFound
from hostruntime.wire.background import StartCommand
from hostruntime.wire.builds import StartBuild
from hostruntime.wire.commands import Exec
from hostruntime.wire.sandboxes import CreateSandbox, SandboxInfo, SnapshotInfo
from tests.host.agent import Agent, eventually
from tests.host.client import HostClient
from tests.host.conftest import BASE, NewSandbox

pytestmark = [pytest.mark.host, pytest.mark.pythons]

_numbers = count(1)
Take = Callable[[str], SnapshotInfo]


@pytest.fixture
def take(host: HostClient) -> Iterator[Take]:
    """Takes snapshots that are deleted when the test ends."""
    made: list[str] = []

    def snapshot(sandbox_id: str) -> SnapshotInfo:
        made.append(f"snap_test{time.time_ns():x}{next(_numbers)}")
        return host.create_snapshot(made[-1], sandbox_id)

    yield snapshot
    for name in made:
        with suppress(HostError):
            host.delete_snapshot(name)


def run(host: HostClient, sandbox_id: str, command: str) -> str:
    done = host.exec(sandbox_id, Exec(command))
    assert done.code == 0, (command, done.stdout, done.stderr)
    return done.stdout.decode().strip()


def fork(new_sandbox: NewSandbox, snapshot: SnapshotInfo, **wishes: object) -> SandboxInfo:
    return new_sandbox(image="", snapshot=snapshot.id, **wishes)


def traces(agent: Agent, snapshot_id: str) -> list[Path]:
    """What there is of a snapshot on the host."""
    users = (agent.state / "images").glob(f"*/users/*{snapshot_id}*")
    kept = (agent.state / "snapshots").glob(f"*{snapshot_id}*")
    return sorted({path.resolve() for path in (*users, *kept)})


def frozen(prefix: str) -> list[str]:
    """The containers of this agent's that stand still now."""
    layout = cgroup_layout()
    names = layout.container_names(prefix)
    return [name for name in names if is_frozen(layout.container(name).unified)]


WRITE_EVERYWHERE = """
for d in /root /workspace /tmp /dev/shm; do echo before >$d/mark; done
ln -s mark /workspace/link; mkdir -m 0750 /tmp/d; chown 1000:1000 /tmp/d
rm /etc/hostname; echo mine >/etc/motd
"""


def test_a_fork_has_what_was_there_and_nothing_of_what_came_after(
    host: HostClient, sandbox: SandboxInfo, new_sandbox: NewSandbox, take: Take
) -> None:
    run(host, sandbox.id, WRITE_EVERYWHERE)
    snapshot = take(sandbox.id)
    run(host, sandbox.id, "for d in /root /workspace /tmp; do echo after >$d/mark; done")
    run(host, sandbox.id, "touch /root/new /workspace/new")
    forked = fork(new_sandbox, snapshot)
    marks = "cat /root/mark /workspace/mark /tmp/mark /dev/shm/mark"
    assert run(host, forked.id, marks).split() == ["before"] * 4
    assert run(host, forked.id, "readlink /workspace/link; stat -c %a:%u:%g /tmp/d").split() == [
        "mark",
        "750:1000:1000",
    ]
    assert run(host, forked.id, "cat /etc/motd; ls /etc/hostname 2>&1 || true").startswith("mine\n")
    assert run(host, forked.id, "ls -d /root/new /workspace/new 2>/dev/null || echo none") == "none"
    # And from then on they are apart.
    run(host, forked.id, "echo fork >/root/mark")
    assert run(host, sandbox.id, "cat /root/mark") == "after"
    assert run(host, fork(new_sandbox, snapshot).id, "cat /root/mark") == "before"


def test_the_source_goes_on_with_its_processes_and_the_files_they_have_open(
    agent: Agent, host: HostClient, sandbox: SandboxInfo, new_sandbox: NewSandbox, take: Take
) -> None:
    script = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.01; done"
    run(
        host, sandbox.id, f"setsid sh -c '{script}' >/root/log 2>&1 </dev/null & echo $! >/root/pid"
    )
    # Deleted while it is open: without a journal its blocks would be lost in the copy.
    holder = (
        "exec 3>/root/gone; rm /root/gone; head -c 1000000 /dev/zero >&3; touch /root/on; "
        "exec sleep 1000"
    )
    run(host, sandbox.id, f"setsid sh -c '{holder}' >/dev/null 2>&1 </dev/null &")
    run(host, sandbox.id, "until [ -e /root/on ] && [ -s /root/log ]; do sleep 0.02; done")
    # Then nobody but who is frozen writes to its disk, which needs no freeze of its own.
    groups = cgroup_layout().container(f"{agent.prefix}{sandbox.id}")
    assert not groups.has_supervisors()
    snapshot = take(sandbox.id)
    assert snapshot.frozen_ms > 0
    seen = int(run(host, sandbox.id, "kill -0 $(cat /root/pid) && tail -n1 /root/log"))
    for _ in eventually():
        if int(run(host, sandbox.id, "tail -n1 /root/log")) > seen:
            break
    assert frozen(agent.prefix) == []
    forked = fork(new_sandbox, snapshot)
    lines = run(host, forked.id, "cat /root/log").split()
    assert lines == [str(number) for number in range(1, len(lines) + 1)]
    assert len(lines) <= seen
    # Memory is not captured: nobody writes in there.
    time.sleep(0.2)
    assert run(host, forked.id, "cat /root/log").split() == lines
    # What keeps a background command's output is not frozen.
    host.start_command(sandbox.id, StartCommand("cmd_prints", "yes"))
    assert groups.has_supervisors()
    assert take(sandbox.id).frozen_ms > 0
    assert host.command(sandbox.id, "cmd_prints").running


def test_a_fork_takes_limits_and_network_of_its_own_and_the_disk_of_the_snapshot(
    host: HostClient, new_sandbox: NewSandbox, take: Take
) -> None:
    source = new_sandbox(disk_mb=64)
    snapshot = take(source.id)
    forked = fork(new_sandbox, snapshot, network="restricted", memory_mb=256)
    assert forked.network == "restricted"
    assert run(host, forked.id, "echo ${HTTPS_PROXY:+there}") == "there"
    assert snapshot.disk_mb == 64
    assert int(run(host, forked.id, "df -m / | tail -n1 | awk '{print $2}'")) <= 64


def test_commands_meanwhile_wait_and_other_sandboxes_do_not_notice(
    host: HostClient, sandbox: SandboxInfo, new_sandbox: NewSandbox, take: Take
) -> None:
    """An attach into a frozen container would stop the launcher, and with it everybody."""
    other = new_sandbox()
    run(host, sandbox.id, "head -c 900000000 /dev/urandom >/root/large")
    stop, slowest, failures = threading.Event(), {sandbox.id: 0.0, other.id: 0.0}, list[str]()

    def keep_asking(sandbox_id: str) -> None:
        while not stop.is_set():
            began = time.monotonic()
            try:
                run(host, sandbox_id, "true")
            except (HostError, AssertionError) as error:
                failures.append(str(error))
            slowest[sandbox_id] = max(slowest[sandbox_id], time.monotonic() - began)

    # More of them than there are launchers.
    asked = [*[sandbox.id] * 4, other.id]
    threads = [threading.Thread(target=keep_asking, args=(one,)) for one in asked]
    for thread in threads:
        thread.start()
    snapshot = take(sandbox.id)
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert slowest[other.id] < max(0.25, snapshot.frozen_ms / 2000), (slowest, snapshot)


def test_deleting_leaves_nothing_and_may_be_repeated(
    agent: Agent, host: HostClient, sandbox: SandboxInfo, take: Take
) -> None:
    snapshot = take(sandbox.id)
    assert host.create_snapshot(snapshot.id, sandbox.id) == snapshot
    assert snapshot in host.snapshots()
    assert len(traces(agent, snapshot.id)) == 2
    host.delete_snapshot(snapshot.id)
    assert traces(agent, snapshot.id) == []
    assert snapshot not in host.snapshots()
    host.delete_snapshot(snapshot.id)


def test_it_outlives_its_sandbox_its_image_and_the_agent(
    agent: Agent, host: HostClient, new_sandbox: NewSandbox, take: Take
) -> None:
    image = f"tmpl_test{time.time_ns():x}"
    host.start_build(
        StartBuild(image, base_image=BASE, recipe=["echo built >/root/built"], network="off")
    )
    assert [event.kind for event in host.build_events(image)][-1] == "published"
    source = new_sandbox(image=image)
    run(host, source.id, "echo before >/root/mark; echo ram >/workspace/mark")
    snapshot = take(source.id)
    host.delete_sandbox(source.id)
    host.delete_image(image)
    with pytest.raises(HostError):
        host.image(image)
    agent.kill()
    agent.start()
    assert snapshot in host.snapshots()
    forked = fork(new_sandbox, snapshot)
    found = run(host, forked.id, "cat /root/built /root/mark /workspace/mark").split()
    assert found == ["built", "before", "ram"]
    host.delete_snapshot(snapshot.id)
    assert run(host, forked.id, "cat /root/built") == "built"
    assert len(list((agent.state / "images").glob(image))) == 1
    host.delete_sandbox(forked.id)
    assert list((agent.state / "images").glob(image)) == []


def test_an_agent_killed_while_all_is_frozen_lets_go_at_its_next_start(
    agent: Agent, host: HostClient, sandbox: SandboxInfo
) -> None:
    run(host, sandbox.id, "head -c 600000000 /dev/urandom >/root/large; echo 1 >/root/mark")
    name, prefix = f"snap_test{time.time_ns():x}", agent.prefix

    def ask() -> None:
        with suppress(HostError):
            host.create_snapshot(name, sandbox.id)

    asking = threading.Thread(target=ask)
    asking.start()
    disk = agent.state / "snapshots" / f".{name}" / "disk.ext4"
    until = time.monotonic() + 60
    while not disk.exists():
        assert time.monotonic() < until
        time.sleep(0.001)
    agent.kill()
    asking.join()
    assert frozen(prefix) == [f"{prefix}{sandbox.id}"]
    agent.start()
    assert frozen(agent.prefix) == []
    assert run(host, sandbox.id, "echo 2 >>/root/mark; sync; cat /root/mark").split() == ["1", "2"]
    assert traces(agent, name) == []


def test_what_cannot_be_taken_leaves_nothing(
    agent: Agent, host: HostClient, sandbox: SandboxInfo, new_sandbox: NewSandbox
) -> None:
    names = [f"snap_test{time.time_ns():x}{number}" for number in range(3)]
    with pytest.raises(NotFound):
        host.create_snapshot(names[0], "sbx_nobody")
    ended = new_sandbox()
    host.set_deadline(ended.id, time.time())
    for _ in eventually():
        if host.sandbox(ended.id).state == "gone":
            break
    with pytest.raises(ContainerGone):
        host.create_snapshot(names[1], ended.id)
    with pytest.raises(InvalidRequest):
        host.create_snapshot("../x", sandbox.id)
    # A tenant's own tar can only spoil the tenant's own snapshot.
    run(host, sandbox.id, "echo x >/tmp/x; printf '#!/bin/sh\nexit 7\n' >/usr/bin/tar")
    with pytest.raises(HostError, match="status 7"):
        host.create_snapshot(names[2], sandbox.id)
    assert [trace for name in names for trace in traces(agent, name)] == []
    assert frozen(agent.prefix) == []
    assert run(host, sandbox.id, "cat /tmp/x") == "x"


def test_a_fork_of_no_snapshot_leaves_nothing(agent: Agent, host: HostClient) -> None:
    with pytest.raises(NotFound):
        host.create_sandbox(CreateSandbox("sbx_none", snapshot="snap_none", cpu=1, memory_mb=512))
    with pytest.raises(InvalidRequest):
        host.create_sandbox(
            CreateSandbox("sbx_none", image=BASE, snapshot="snap_none", cpu=1, memory_mb=512)
        )
    assert not (agent.state / "sandboxes" / "sbx_none").exists()


def test_terminating_does_not_wait_for_a_snapshot(
    agent: Agent, host: HostClient, sandbox: SandboxInfo
) -> None:
    run(host, sandbox.id, "head -c 600000000 /dev/urandom >/root/large")
    name, failures = f"snap_test{time.time_ns():x}", list[HostError]()

    def ask() -> None:
        try:
            host.create_snapshot(name, sandbox.id)
        except HostError as error:
            failures.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    disk = agent.state / "snapshots" / f".{name}" / "disk.ext4"
    until = time.monotonic() + 60
    while not disk.exists():
        assert time.monotonic() < until
        time.sleep(0.001)
    host.delete_sandbox(sandbox.id)
    asking.join()
    assert len(failures) == 1
    assert traces(agent, name) == []
