"""How many commands run at once, counted where they run."""

from __future__ import annotations

from contextlib import aclosing
from typing import Any, cast

import pytest

from hostruntime.client.async_host_client import AsyncHostClient
from hostruntime.errors import TooManyCommands
from hostruntime.wire.commands import Exec, Quota
from hostruntime.wire.sandboxes import SandboxInfo
from tests.host.agent import Agent, eventually
from tests.host.client import HostClient

pytestmark = pytest.mark.host
TWO = Quota("team_a", 2)


def frames(client: AsyncHostClient, sandbox: str, command: str, quota: Quota) -> Any:
    return aclosing(cast("Any", client.exec_frames(sandbox, Exec(command, quota=quota))))


async def test_one_too_many_is_refused_and_runs_nothing(
    agent: Agent, host: HostClient, sandbox: SandboxInfo
) -> None:
    async with AsyncHostClient(agent.socket) as client:
        async with (
            frames(client, sandbox.id, "sleep 300", TWO) as first,
            frames(client, sandbox.id, "sleep 300", TWO) as second,
        ):
            await anext(first)
            await anext(second)
            assert host.commands() == {"team_a": 2}
            with pytest.raises(TooManyCommands) as refused:
                await client.exec_to_completion(sandbox.id, Exec("touch /tmp/ran", quota=TWO))
            assert refused.value.running == 2
            assert not host.stat(sandbox.id, "/tmp/ran").exists
            # Another scope has places of its own, and who names none is not counted.
            other = Quota("team_b", 1)
            assert (
                await client.exec_to_completion(sandbox.id, Exec("true", quota=other))
            ).code == 0
            assert (await client.exec_to_completion(sandbox.id, Exec("true"))).code == 0
        for _ in eventually():
            if host.commands() == {}:
                break
        assert (await client.exec_to_completion(sandbox.id, Exec("true", quota=TWO))).code == 0


async def test_one_whose_reader_left_counts_until_it_has_ended(
    agent: Agent, host: HostClient, sandbox: SandboxInfo
) -> None:
    """It will not hear of SIGTERM, and so takes its place for two seconds more."""
    async with AsyncHostClient(agent.socket) as client:
        stubborn = "trap '' TERM; echo up; while :; do sleep 0.1; done"
        async with frames(client, sandbox.id, stubborn, TWO) as running:
            while (await anext(running)).data != b"up\n":
                pass
        assert host.commands() in ({"team_a": 1}, {})
        for _ in eventually():
            if host.commands() == {}:
                break


@pytest.mark.parametrize("command", ["true", "false", "exec /no/such", "kill -9 $$"])
async def test_however_a_command_ends_its_place_is_free(
    agent: Agent, host: HostClient, sandbox: SandboxInfo, command: str
) -> None:
    async with AsyncHostClient(agent.socket) as client:
        for _ in range(5):
            await client.exec_to_completion(sandbox.id, Exec(command, quota=Quota("team_a", 1)))
    assert host.commands() == {}


async def test_one_past_its_time_frees_its_place(
    agent: Agent, host: HostClient, sandbox: SandboxInfo
) -> None:
    async with AsyncHostClient(agent.socket) as client:
        with pytest.raises(Exception, match="ran past its time"):
            await client.exec_to_completion(
                sandbox.id, Exec("sleep 60", timeout_seconds=0.3, quota=TWO)
            )
        with pytest.raises(Exception, match="directory"):
            await client.exec_to_completion(sandbox.id, Exec("true", cwd="/no/such", quota=TWO))
    assert host.commands() == {}
