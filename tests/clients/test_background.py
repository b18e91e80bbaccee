"""Background commands by the official SDK, unmodified, and who may die meanwhile."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from orkestr import BackgroundCommand, OrkestrClient, Sandbox
from orkestr.errors import ExecKilled, ExecTimeout, OrkestrError, SandboxNotReady

from tests.clients.making import Sandboxes
from tests.processes import commands_containing, own_mark
from tests.stack import Stack, wait_for


def begin(sandbox: Sandbox, command: str, **more: str) -> BackgroundCommand:
    begun = sandbox.exec(command, background=True, env=more)
    assert isinstance(begun, BackgroundCommand)
    return begun


def test_it_is_started_read_waited_for_and_listed(sandbox: Sandbox) -> None:
    before = datetime.now(UTC) - timedelta(seconds=5)
    command = 'echo "$A"; pwd; until [ -e go ]; do sleep 0.02; done; echo größe; exit 3'
    begun = begin(sandbox, command, A="b")
    assert (begun.status, begun.exit_code, begun.command) == ("running", None, command)
    assert begun.started_at is not None
    assert before < begun.started_at < datetime.now(UTC) + timedelta(seconds=5)
    assert sandbox.exec(f"kill -0 {begun.pid}").exit_code == 0
    wait_for(lambda: begun.logs().size == 13, 30)
    assert begun.logs().content == "b\n/workspace\n"
    with pytest.raises(ExecTimeout):
        begun.wait(poll_seconds=0.05, timeout=0.2)
    sandbox.files.write("/workspace/go", "")
    assert begun.wait(poll_seconds=0.05, timeout=30) == 3
    assert (begun.status, begun.exit_code) == ("exited", 3)
    logs = begun.logs(offset=13)
    assert (logs.content, logs.size, logs.truncated) == ("größe\n", 21, False)
    second = begin(sandbox, "kill -SEGV $$")
    assert second.wait(poll_seconds=0.05, timeout=30) is None
    assert second.status == "killed"
    assert [(each.id, each.status) for each in sandbox.commands()] == [
        (second.id, "killed"),
        (begun.id, "exited"),
    ]


def test_the_log_is_read_in_parts_as_the_client_does(sandbox: Sandbox) -> None:
    begun = begin(sandbox, 'for i in $(seq 60000); do echo "€ $i größe und mehr"; done')
    assert begun.wait(poll_seconds=0.1, timeout=60) == 0
    content, offset, parts = "", 0, 0
    while True:
        logs = begun.logs(offset=offset)
        content += logs.content
        offset += len(logs.content.encode())
        parts += 1
        if not logs.truncated:
            break
    assert parts > 1
    assert content.splitlines() == [f"€ {i} größe und mehr" for i in range(1, 60001)]
    assert offset == logs.size


def test_it_is_killed_with_all_it_has_started(sandbox: Sandbox) -> None:
    mark = own_mark()
    script = f"setsid sh -c 'sleep {mark} & sleep {mark}' & (sleep {mark} &); sleep {mark}"
    begun = begin(sandbox, script)
    wait_for(lambda: len(commands_containing(f"sleep {mark}")) >= 4, 30)
    for _ in range(2):
        begun.kill()
        assert (begun.status, begun.exit_code) == ("killed", None)
    assert commands_containing(f"sleep {mark}") == []
    assert begun.wait(timeout=1) is None
    with pytest.raises(ExecKilled):
        list(begun.stream())
    done = begin(sandbox, "exit 4")
    done.wait(poll_seconds=0.05, timeout=30)
    done.kill()
    assert (done.status, done.exit_code) == ("exited", 4)


def test_it_is_followed_to_its_end_or_for_a_while(sandbox: Sandbox) -> None:
    begun = begin(sandbox, "echo one; until [ -e go ]; do sleep 0.02; done; echo two; exit 5")
    seen = []
    for chunk in begun.stream():
        seen.append(chunk.data)
        if chunk.data == "one\n":
            sandbox.files.write("/workspace/go", "")
        last = chunk
    assert "".join(seen) == "one\ntwo\n"
    assert (last.is_final, last.exit_code) == (True, 5)
    assert "".join(chunk.data for chunk in begun.stream(offset=4)) == "two\n"
    stays = begin(sandbox, "echo on; exec sleep 600")
    with pytest.raises(ExecTimeout):
        list(stays.stream(timeout_seconds=1))
    assert stays.refresh().status == "running"


def test_it_pauses_with_its_sandbox_and_ends_with_it(
    sdk: OrkestrClient, sandboxes: Sandboxes
) -> None:
    mark, sandbox = own_mark(), sandboxes.boot("debian-12")
    counting = begin(sandbox, "n=0; while :; do n=$((n+1)); echo $n; sleep 0.01; done")
    begin(sandbox, f"exec sleep {mark}")
    wait_for(lambda: counting.logs().size > 10, 30)
    sandbox.pause()
    assert counting.refresh().status == "running"
    with pytest.raises(SandboxNotReady):
        begin(sandbox, "true")
    size = counting.logs().size
    assert counting.logs().size == size
    Sandbox.resume(sandbox.id, client=sdk)
    wait_for(lambda: counting.logs().size > size, 30)
    sandbox.terminate()
    assert commands_containing(f"sleep {mark}") == []
    with pytest.raises(OrkestrError):
        counting.refresh()


def test_it_outlives_agent_and_web_and_so_do_those_who_follow(
    stack: Stack, sandbox: Sandbox
) -> None:
    script = "n=0; while [ ! -e stop ]; do n=$((n+1)); echo $n; sleep 0.01; done; exit 7"
    begun = begin(sandbox, script)
    seen: list[str] = []
    codes: list[int | None] = []

    def follow() -> None:
        for chunk in begun.stream():
            seen.append(chunk.data)
            codes.append(chunk.exit_code)

    follower = threading.Thread(target=follow)
    follower.start()
    wait_for(lambda: "3\n" in "".join(seen), 30)
    agent = stack.pid("agent")
    stack.kill("agent")
    stack.wait_until_restarted("agent", agent, 60)
    reached = len("".join(seen))
    wait_for(lambda: len("".join(seen)) > reached, 60)
    sandbox.files.write("/workspace/stop", "")
    follower.join(60)
    assert codes[-1] == 7
    numbers = [int(line) for line in "".join(seen).split()]
    assert numbers == list(range(1, len(numbers) + 1))
    assert begun.refresh().exit_code == 7
    stays = begin(sandbox, "echo on; exec sleep 600")
    web = stack.pid("web")
    stack.kill("web")
    stack.wait_until_restarted("web", web, 60)
    wait_for(lambda: _answers(stack), 60)
    assert stays.refresh().status == "running"
    assert stays.logs().content == "on\n"


def _answers(stack: Stack) -> bool:
    try:
        with stack.client() as client:
            return client.get("/v1/sandboxes/limits").status_code == 200
    except httpx.HTTPError:
        return False


def test_a_process_that_is_not_the_one_who_started_it_finds_it(
    stack: Stack, sandbox: Sandbox
) -> None:
    begun = begin(sandbox, "exec sleep 600")
    with OrkestrClient(api_key=stack.api_key, base_url=stack.url) as other:
        [found] = Sandbox.get(sandbox.id, client=other).commands()
        assert found == begun
        found.kill()
    assert begun.refresh().status == "killed"
