"""Commands in the background, as the tests of the host start and read them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from hostruntime.client.async_host_client import AsyncHostClient
from hostruntime.container.cgroups import cgroup_layout, pids_in
from hostruntime.wire.background import CommandFrame, CommandInfo, FollowCommand, StartCommand
from hostruntime.wire.sandboxes import SandboxInfo
from tests.host.agent import Agent, container_of, eventually
from tests.host.client import HostClient
from tests.processes import command_lines

TITLE = "orkestr hostruntime.container.supervisor"
_numbers = count(1)


def begin(host: HostClient, sandbox: SandboxInfo, command: str, **more: Any) -> str:
    """Start a command in the background; its id."""
    name = f"cmd_{os.getpid()}n{next(_numbers)}"
    return host.start_command(sandbox.id, StartCommand(name, command, **more)).id


def ended(host: HostClient, sandbox: SandboxInfo, name: str) -> CommandInfo:
    """The command, once it has ended."""
    for _ in eventually():
        info = host.command(sandbox.id, name)
        if not info.running:
            break
    return info


def printed(host: HostClient, sandbox: SandboxInfo, name: str, offset: int = 0) -> bytes:
    return host.command_output(sandbox.id, name, offset).data


def wait_for_output(host: HostClient, sandbox: SandboxInfo, name: str, text: bytes) -> None:
    for _ in eventually():
        if text in printed(host, sandbox, name):
            break


def with_mark(mark: str) -> list[int]:
    """The processes whose command line has it, but for shells, which have it in their script."""
    return [pid for pid, line in command_lines().items() if line == f"sleep {mark}"]


def groups_of(agent: Agent, sandbox: SandboxInfo) -> Any:
    return cgroup_layout().container(container_of(agent.state, sandbox.id))


def supervisors(agent: Agent, sandbox: SandboxInfo) -> list[int]:
    lines = command_lines()
    members = pids_in(groups_of(agent, sandbox).monitor)
    return [pid for pid in members if lines.get(pid, "").startswith(TITLE)]


def files_of(agent: Agent, sandbox: SandboxInfo) -> list[Path]:
    """What there is of its commands on the host's disk, and on the sandbox's own."""
    instance = agent.prefix.rstrip("-").removeprefix("ork")
    disk = Path("/run/orkestr") / instance / "disks" / sandbox.id / "commands"
    records = agent.state / "sandboxes" / sandbox.id / "commands"
    return [path for place in (disk, records) for path in place.glob("*")]


def on_loop[T](agent: Agent, work: Callable[[AsyncHostClient], Any]) -> Any:
    async def run() -> Any:
        async with AsyncHostClient(agent.socket) as client:
            return await work(client)

    return asyncio.run(run())


async def frames_of(
    client: AsyncHostClient, sandbox: SandboxInfo, name: str, offset: int = 0, seconds: float = 60
) -> list[CommandFrame]:
    request = FollowCommand(offset, seconds)
    return [frame async for frame in client.follow_command(sandbox.id, name, request)]
