"""Paused sandboxes: everything in them stands still, and goes on where it stood."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from hostruntime.errors import ContainerGone, ContainerPaused, NotFound
from hostruntime.wire.commands import Exec
from hostruntime.wire.sandboxes import SandboxInfo
from tests.host.agent import Agent, eventually, groups_named, init_of
from tests.host.client import HostClient
from tests.host.commands import Command
from tests.host.conftest import NewSandbox

pytestmark = [pytest.mark.host, pytest.mark.pythons]

COUNTING = (
    "n=0; while :; do n=$((n+1)); echo $n >/tmp/n.new; mv /tmp/n.new /tmp/n; sleep 0.02; done"
)
# Once it has begun to.
COUNTS = "until [ -s /tmp/n ]; do sleep 0.02; done"
SHOWN = "cat /tmp/n; cat /workspace/kept /root/kept"


def far() -> float:
    return time.time() + 600


def number(host: HostClient, sandbox: SandboxInfo) -> int:
    return int(host.exec(sandbox.id, Exec("cat /tmp/n")).stdout)


@pytest.fixture
def counting(host: HostClient, new_sandbox: NewSandbox) -> SandboxInfo:
    """A sandbox in which a process counts, and holds the number in its own memory alone."""
    sandbox = new_sandbox()
    host.exec(
        sandbox.id,
        Exec(
            f"echo yes | tee /workspace/kept >/root/kept; ({COUNTING}) >/dev/null 2>&1 & {COUNTS}"
        ),
    )
    for _ in eventually():
        if number(host, sandbox) > 2:
            break
    return sandbox


def test_processes_memory_and_files_come_back(host: HostClient, counting: SandboxInfo) -> None:
    assert host.pause_sandbox(counting.id, far()).paused
    with pytest.raises(ContainerPaused):
        host.exec(counting.id, Exec("true"))
    with pytest.raises(ContainerPaused):
        host.read_path(counting.id, "/tmp/n")
    assert not host.resume_sandbox(counting.id, far()).paused
    first = number(host, counting)
    for _ in eventually():
        if number(host, counting) > first:
            break
    assert host.exec(counting.id, Exec(SHOWN)).stdout.split()[1:] == [b"yes", b"yes"]


def test_nothing_is_counted_while_it_is_paused(
    agent: Agent, host: HostClient, counting: SandboxInfo
) -> None:
    """Read from outside, where what is in its /tmp can be seen although it stands still."""
    counted = Path(f"/proc/{init_of(agent, counting.id)}/root/tmp/n")
    host.pause_sandbox(counting.id, far())
    stood = int(counted.read_text())
    # Where it ran, it would count some fifty.
    time.sleep(1)
    assert int(counted.read_text()) == stood
    host.resume_sandbox(counting.id, far())
    for _ in eventually():
        if number(host, counting) > stood:
            break


def test_a_command_under_way_ends_after_the_pause(host: HostClient, sandbox: SandboxInfo) -> None:
    script = "echo a; until [ -e /workspace/on ]; do sleep 0.02; done; echo b"
    command = Command(host, sandbox.id, script, timeout_seconds=60)
    host.pause_sandbox(sandbox.id, far())
    time.sleep(0.5)
    assert command.is_alive()
    host.resume_sandbox(sandbox.id, far())
    host.write_file(sandbox.id, "/workspace/on", b"")
    command.join(30)
    assert command.result is not None
    assert command.result.stdout == b"a\nb\n"


def test_others_are_served_while_one_is_paused(
    host: HostClient, counting: SandboxInfo, new_sandbox: NewSandbox
) -> None:
    other = new_sandbox()
    stop = threading.Event()

    def attach_all_the_time() -> None:
        while not stop.is_set():
            try:
                host.exec(counting.id, Exec("true"))
            except ContainerPaused:
                time.sleep(0.001)

    threads = [threading.Thread(target=attach_all_the_time) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            host.pause_sandbox(counting.id, far())
            # Were it held up by the paused one, it would wait for what comes after it.
            assert host.exec(other.id, Exec("echo here")).stdout == b"here\n"
            host.resume_sandbox(counting.id, far())
            time.sleep(0.02)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_a_paused_sandbox_ends_at_its_deadline_and_when_told(
    host: HostClient, new_sandbox: NewSandbox, agent: Agent
) -> None:
    first, second = new_sandbox(), new_sandbox()
    host.pause_sandbox(first.id, time.time() + 0.2)
    host.pause_sandbox(second.id, far())
    host.delete_sandbox(second.id)
    with pytest.raises(NotFound):
        host.sandbox(second.id)
    for _ in eventually():
        gone = host.sandbox(first.id)
        if gone.state == "gone":
            break
    assert gone.reason == "expired"
    with pytest.raises(ContainerGone):
        host.resume_sandbox(first.id, far())
    assert groups_named(f"{agent.prefix}{first.id}") == []
    assert groups_named(f"{agent.prefix}{second.id}") == []


def test_pausing_twice_and_resuming_twice_is_no_error(
    host: HostClient, sandbox: SandboxInfo
) -> None:
    for _ in range(2):
        host.pause_sandbox(sandbox.id, far())
    for _ in range(2):
        host.resume_sandbox(sandbox.id, far())
    assert host.exec(sandbox.id, Exec("echo on")).stdout == b"on\n"


def test_a_paused_sandbox_outlives_the_agent(
    agent: Agent, host: HostClient, counting: SandboxInfo, new_sandbox: NewSandbox
) -> None:
    running = new_sandbox()
    before = number(host, counting)
    host.pause_sandbox(counting.id, far())
    agent.kill()
    agent.start()
    assert host.sandbox(counting.id).paused
    with pytest.raises(ContainerPaused):
        host.exec(counting.id, Exec("true"))
    assert host.exec(running.id, Exec("echo on")).stdout == b"on\n"
    host.resume_sandbox(counting.id, far())
    for _ in eventually():
        if number(host, counting) > before + 2:
            break


def test_one_that_ends_as_it_is_paused_is_gone_and_no_fault(
    agent: Agent, host: HostClient, new_sandbox: NewSandbox
) -> None:
    """The agent may hear of the end first, or find a group in which nothing is left to freeze."""
    for _ in range(10):
        sandbox = new_sandbox()
        os.kill(init_of(agent, sandbox.id), signal.SIGKILL)
        with contextlib.suppress(ContainerGone):
            host.pause_sandbox(sandbox.id, far())
        for _ in eventually():
            if host.sandbox(sandbox.id).state == "gone":
                break


def paused_by_itself(host: HostClient, sandbox_id: str) -> None:
    for _ in eventually():
        if host.sandbox(sandbox_id).paused:
            return


def test_at_its_deadline_it_is_paused_if_that_was_asked_for(
    host: HostClient, new_sandbox: NewSandbox
) -> None:
    sandbox = new_sandbox(deadline=time.time() + 600, pause_seconds=3600)
    host.exec(
        sandbox.id, Exec(f"echo yes >/workspace/kept; ({COUNTING}) >/dev/null 2>&1 & {COUNTS}")
    )
    for _ in range(2):
        host.set_deadline(sandbox.id, time.time())
        paused_by_itself(host, sandbox.id)
        info = host.sandbox(sandbox.id)
        assert info.deadline is not None
        assert 3500 < info.deadline - time.time() <= 3600
        with pytest.raises(ContainerPaused):
            host.exec(sandbox.id, Exec("true"))
        # It counts on, and is paused again the next time.
        host.resume_sandbox(sandbox.id, far())
        first = number(host, sandbox)
        for _ in eventually():
            if number(host, sandbox) > first:
                break
        assert host.exec(sandbox.id, Exec("cat /workspace/kept")).stdout == b"yes\n"


def test_one_that_was_paused_at_its_deadline_ends_at_the_next(
    host: HostClient, new_sandbox: NewSandbox
) -> None:
    sandbox = new_sandbox(deadline=time.time() + 1, pause_seconds=1)
    for _ in eventually():
        if host.sandbox(sandbox.id).state == "gone":
            break
    assert host.sandbox(sandbox.id).reason == "expired"
