"""Followers of commands in the background: what they are sent, and what they cost."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from contextlib import aclosing, suppress
from pathlib import Path

import pytest

from hostruntime.client.async_host_client import AsyncHostClient
from hostruntime.errors import (
    TooManyCommands,
)
from hostruntime.sandbox.background import (
    MAX_FOLLOWERS,
    READS_PER_SECOND,
)
from hostruntime.wire.background import CommandFrame, FollowCommand
from hostruntime.wire.sandboxes import SandboxInfo
from tests.host.agent import Agent, eventually
from tests.host.background import (
    begin,
    frames_of,
    on_loop,
)
from tests.host.client import HostClient
from tests.host.conftest import NewSandbox

pytestmark = [pytest.mark.host, pytest.mark.pythons]

FOLLOWERS = 200


def test_followed_it_comes_as_it_is_printed_until_the_end(
    agent: Agent, host: HostClient, sandbox: SandboxInfo
) -> None:
    name = begin(host, sandbox, "echo one; until [ -e go ]; do sleep 0.02; done; echo two; exit 5")

    async def work(client: AsyncHostClient) -> list[CommandFrame]:
        frames = []
        async with aclosing(client.follow_command(sandbox.id, name, FollowCommand())) as stream:  # type: ignore[type-var]
            async for frame in stream:
                frames.append(frame)
                if frame.data == b"one\n":
                    await asyncio.to_thread(host.write_file, sandbox.id, "/workspace/go", b"")
        return frames

    *output, last = on_loop(agent, work)
    assert b"".join(frame.data for frame in output) == b"one\ntwo\n"
    assert (last.kind, last.command.code, last.offset) == ("ended", 5, 8)
    again = on_loop(agent, lambda client: frames_of(client, sandbox, name, 4))
    assert [(frame.kind, frame.data) for frame in again] == [("output", b"two\n"), ("ended", b"")]


def test_followed_it_ends_at_its_own_time_also_in_a_flood(
    agent: Agent, host: HostClient, sandbox: SandboxInfo
) -> None:
    silent = begin(host, sandbox, "exec sleep 600")
    *_, last = on_loop(agent, lambda client: frames_of(client, sandbox, silent, seconds=0.2))
    assert last.kind == "timeout"
    flood = begin(host, sandbox, "yes")
    *_, last = on_loop(agent, lambda client: frames_of(client, sandbox, flood, seconds=0.5))
    assert last.kind == "timeout"
    assert host.command(sandbox.id, flood).running


def test_followed_it_says_that_the_sandbox_ended(
    agent: Agent, host: HostClient, new_sandbox: NewSandbox
) -> None:
    sandbox = new_sandbox()
    name = begin(host, sandbox, "exec sleep 600")

    async def work(client: AsyncHostClient) -> list[CommandFrame]:
        following = asyncio.create_task(frames_of(client, sandbox, name))
        await asyncio.sleep(0.2)
        await asyncio.to_thread(host.delete_sandbox, sandbox.id)
        return await following

    *_, last = on_loop(agent, work)
    assert last.kind == "ended"
    assert last.command is None or last.command.signal in (None, signal.SIGKILL)


def test_many_followers_hold_no_thread_and_leave_nothing_behind(
    agent: Agent, host: HostClient, sandbox: SandboxInfo
) -> None:
    name = begin(host, sandbox, "until [ -e go ]; do sleep 0.02; done; echo on; exec sleep 600")

    def counts() -> tuple[int, int]:
        process = Path(f"/proc/{agent.pid}")
        threads, descriptors = (len(list((process / each).iterdir())) for each in ("task", "fd"))
        return threads, descriptors

    def watched() -> int:
        """How many files inotify watches (proc(5), fdinfo)."""
        found = 0
        for path in Path(f"/proc/{agent.pid}/fdinfo").iterdir():
            with suppress(FileNotFoundError):
                found += path.read_text().count("inotify wd:")
        return found

    on_loop(agent, lambda client: frames_of(client, sandbox, name, seconds=0.1))
    threads, descriptors = counts()

    told: list[str] = []

    async def follow(client: AsyncHostClient) -> None:
        async for frame in client.follow_command(sandbox.id, name, FollowCommand()):
            told.append(frame.kind)

    async def until(condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not condition():
                await asyncio.sleep(0.02)

    async def work(client: AsyncHostClient) -> None:
        following = [asyncio.create_task(follow(client)) for _ in range(FOLLOWERS)]
        # All of them share the watches of the two files.
        await until(lambda: watched() == 2)
        # The agent's pool may start some threads meanwhile, and it opens files now and then.
        await until(lambda: 0 <= counts()[1] - descriptors - FOLLOWERS < FOLLOWERS // 2)
        assert counts()[0] < threads + FOLLOWERS // 2
        await asyncio.to_thread(host.write_file, sandbox.id, "/workspace/go", b"")
        await until(lambda: told == ["output"] * FOLLOWERS)
        # Half of them leave; the others are told of the end.
        for task in following[::2]:
            task.cancel()
        await asyncio.gather(*following[::2], return_exceptions=True)
        await asyncio.to_thread(host.kill_command, sandbox.id, name)
        await asyncio.gather(*following[1::2])
        assert told[FOLLOWERS:] == ["ended"] * (FOLLOWERS // 2)

    on_loop(agent, work)
    for _ in eventually():
        if counts()[1] < descriptors + FOLLOWERS // 4 and watched() == 0:
            break
    assert counts()[0] < threads + FOLLOWERS // 4


def test_a_flood_that_many_follow_is_read_no_more_often_for_that(
    agent: Agent, host: HostClient, sandbox: SandboxInfo
) -> None:
    name = begin(host, sandbox, "yes")
    seconds, followers = 3, 200

    async def pieces(client: AsyncHostClient) -> int:
        work = (frames_of(client, sandbox, name, seconds=seconds) for _ in range(followers))
        return sum(map(len, await asyncio.gather(*work)))

    # Each gets a first one at once, and its last.
    assert on_loop(agent, pieces) < READS_PER_SECOND * seconds + 3 * followers


def test_followers_are_limited_and_counted_until_they_leave(
    agent: Agent, host: HostClient, sandbox: SandboxInfo
) -> None:
    name = begin(host, sandbox, "echo on; exec sleep 600")

    async def work(client: AsyncHostClient) -> None:
        tasks = [asyncio.create_task(frames_of(client, sandbox, name)) for _ in range(300)]
        refused, following = set(tasks), set(tasks)
        async with asyncio.timeout(60):
            while len(refused) != 300 - MAX_FOLLOWERS:
                await asyncio.sleep(0.05)
                refused = {task for task in tasks if task.done()}
        for task in refused:
            with pytest.raises(TooManyCommands, match="End one"):
                task.result()
        following -= refused
        for task in following:
            task.cancel()
        await asyncio.gather(*following, return_exceptions=True)
        for _ in range(100):
            with suppress(TooManyCommands):
                *_, last = await frames_of(client, sandbox, name, seconds=0.1)
                assert last.kind == "timeout"
                return
            await asyncio.sleep(0.05)
        raise AssertionError("they are still counted")

    on_loop(agent, work)
