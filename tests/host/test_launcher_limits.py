"""Launchers at their limits: whose fault that is, who pays for it, and what is left of them."""

from __future__ import annotations

import asyncio
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from hostruntime.container.launcher import AtLimit, Attached, LauncherPool, Link
from hostruntime.wire.commands import Exec
from hostruntime.wire.sandboxes import SandboxInfo
from tests.host.agent import Agent, eventually
from tests.host.client import HostClient
from tests.host.conftest import NewSandbox

pytestmark = pytest.mark.host

# Room for what a launcher waits for (poll(2) counts against it), and for nothing new.
FULL = 8
LAUNCHERS = 2
_WAITING = "touch /workspace/begun.{}; while [ ! -e /workspace/go ]; do sleep 0.1; done; echo done"


def limit_descriptors(pid: int, most: int) -> None:
    _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, hard))


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def launchers_of(agent: Agent) -> list[int]:
    """Its launchers, once one that an earlier test had replaced has gone."""
    for _ in eventually():
        if len(now := agent.children()) == LAUNCHERS:
            break
    return now


def wait_until_replaced(agent: Agent, before: list[int]) -> None:
    """By as many as there were."""
    for _ in eventually():
        if not set(launchers_of(agent)) & set(before):
            break


def test_a_full_launcher_is_replaced_and_what_runs_through_it_goes_on(
    agent: Agent, host: HostClient, sandbox: SandboxInfo, new_sandbox: NewSandbox
) -> None:
    other, before = new_sandbox(), launchers_of(agent)
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(host.exec, sandbox.id, Exec(_WAITING.format(n))) for n in range(4)]
        for n in range(4):
            for _ in eventually():
                if host.stat(sandbox.id, f"/workspace/begun.{n}").exists:
                    break
        for pid in before:
            limit_descriptors(pid, FULL)
        assert host.exec(other.id, Exec("echo on")).stdout == b"on\n"
        host.write_file(other.id, "/workspace/x", b"on")
        assert host.exec(new_sandbox().id, Exec("echo on")).stdout == b"on\n"
        # The other one may have nothing to wait for, and is gone.
        now, old = set(agent.children()), set(before)
        assert now - old, "others have taken their place"
        assert now & old, "and the one that the commands run through is still there"
        host.write_file(sandbox.id, "/workspace/go", b"")
        assert [one.result(30).stdout for one in running] == [b"done\n"] * 4
    wait_until_replaced(agent, before)


def test_a_launcher_is_replaced_before_it_is_full(agent: Agent, host: HostClient) -> None:
    before = launchers_of(agent)
    for pid in before:
        limit_descriptors(pid, 2 * descriptors(pid) - 1)
    wait_until_replaced(agent, before)
    assert "descriptors" in agent.log()
    assert host.health().counts["containers"] >= 0


def test_that_the_host_is_out_of_something_is_not_the_sandboxs_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refused(_: Link, message: dict[str, Any], fds: object) -> Attached:
        raise AtLimit("words")

    async def attach_often() -> int:
        pool = LauncherPool(tmp_path, tmp_path / "log")
        await pool.open()
        try:
            for _ in range(8):
                with pytest.raises(AtLimit) as caught:
                    await pool.attach({"name": "ork0-x"}, [])
                assert caught.value.status == 503
            most = len(pool.pids())
            await pool.maintain()
            assert len(pool.pids()) == LAUNCHERS
            return most
        finally:
            await pool.close()

    monkeypatch.setattr(Link, "attach", refused)
    assert asyncio.run(attach_often()) <= 6, "not one launcher more for each that asks"
