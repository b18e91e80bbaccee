"""Pausing and resuming through the official SDK, on a live installation."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from orkestr import OrkestrClient, Sandbox
from orkestr.errors import SandboxNotReady

from orkestr_console.runner.programs import agent_is_ready, web_is_ready
from tests.clients.making import Sandboxes
from tests.stack import Stack, wait_for

# Holds a number in its memory alone, and tells it when it is asked.
HOLDER = """
import os, pathlib, time
held = os.urandom(8).hex()
pathlib.Path("/tmp/first").write_text(held)
while True:
    if pathlib.Path("/tmp/ask").exists():
        pathlib.Path("/tmp/answer").write_text(held)
        break
    time.sleep(0.02)
"""
ANSWER = "touch /tmp/ask; while [ ! -s /tmp/answer ]; do sleep 0.02; done; cat /tmp/answer"


def test_memory_and_files_come_back(sandboxes: Sandboxes, sdk: OrkestrClient) -> None:
    sandbox = sandboxes.boot("python-3.12", timeout_seconds=120)
    sandbox.files.write("/workspace/holder.py", HOLDER)
    sandbox.exec("python /workspace/holder.py >/dev/null 2>&1 & sleep 0.3")
    first = sandbox.exec("cat /tmp/first").stdout
    assert len(first) == 16
    assert sandbox.pause() == sandbox.id
    with pytest.raises(SandboxNotReady, match="resume it first"):
        sandbox.exec("true")
    paused = Sandbox.get(sandbox.id, client=sdk)
    assert paused.status == "paused"
    assert paused.paused_expires_at is not None
    assert paused.paused_expires_at - datetime.now(UTC) > timedelta(days=6)
    resumed = Sandbox.resume(sandbox.id, client=sdk)
    assert resumed.status == "running"
    assert resumed.exec(ANSWER).stdout == first
    assert resumed.expires_at - datetime.now(UTC) < timedelta(seconds=121)


def test_a_paused_sandbox_survives_agent_and_web(
    stack: Stack, sandboxes: Sandboxes, sdk: OrkestrClient
) -> None:
    sandbox = sandboxes.boot("debian-12")
    sandbox.exec("echo kept > /workspace/kept")
    sandbox.pause()
    for program in ("agent", "web"):
        old = stack.pid(program)
        stack.kill(program)
        stack.wait_until_restarted(program, old)
    with stack.host() as host:
        wait_for(lambda: agent_is_ready(stack.layout.host_socket), 30, stack.explain)
        assert host.sandbox(sandbox.id).paused
    wait_for(lambda: web_is_ready(stack.layout), 30, stack.explain)
    resumed = Sandbox.resume(sandbox.id, client=sdk)
    assert resumed.exec("cat /workspace/kept").stdout == "kept\n"


def is_paused(sandbox: Sandbox, sdk: OrkestrClient) -> bool:
    return bool(Sandbox.get(sandbox.id, client=sdk).status == "paused")


def test_it_is_paused_at_its_deadline_and_wakes_when_it_is_used(
    stack: Stack, sandboxes: Sandboxes, sdk: OrkestrClient
) -> None:
    options = {"on_timeout": "pause", "auto_resume": True, "preview_auth": True}
    sandbox = sandboxes.boot("python-3.12", timeout_seconds=10, **options)
    assert (sandbox.on_timeout, sandbox.auto_resume, sandbox.preview_auth) == ("pause", True, True)
    assert sandbox.preview_auth_token
    sandbox.files.write("/workspace/holder.py", HOLDER)
    sandbox.exec("python /workspace/holder.py >/dev/null 2>&1 & sleep 0.3")
    first = sandbox.exec("cat /tmp/first").stdout
    wait_for(lambda: is_paused(sandbox, sdk), 60, stack.explain)
    assert sandbox.exec(ANSWER).stdout == first
    awake = Sandbox.get(sandbox.id, client=sdk)
    assert awake.status == "running"
    assert timedelta(0) < awake.expires_at - datetime.now(UTC) < timedelta(seconds=11)
    # Files wake it as well, and so does a command whose output is streamed.
    awake.pause()
    assert awake.files.read("/workspace/holder.py") == HOLDER
    awake.pause()
    assert "".join(part.data for part in awake.exec_stream("echo on")) == "on\n"


def test_many_calls_at_once_wake_it_once(
    stack: Stack, sandboxes: Sandboxes, sdk: OrkestrClient
) -> None:
    sandbox = sandboxes.boot("debian-12", auto_resume=True)
    sandbox.pause()

    def use(number: int) -> str:
        with OrkestrClient(api_key=stack.api_key, base_url=stack.url) as client:
            return str(Sandbox.get(sandbox.id, client=client).exec(f"echo {number}").stdout)

    with ThreadPoolExecutor(24) as pool:
        assert list(pool.map(use, range(24))) == [f"{number}\n" for number in range(24)]
    counted = "SELECT count(*) FROM sandboxes_app_sandboxevent WHERE sandbox_id = %s AND kind = %s"
    with psycopg.connect(stack.layout.cluster.url) as database:
        rows = [database.execute(counted, [sandbox.id, kind]) for kind in ("resuming", "resumed")]
        assert [row.fetchone() for row in rows] == [(1,), (1,)]
