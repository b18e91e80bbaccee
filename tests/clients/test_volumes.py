"""Volumes through the official SDK, on a live installation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest
from orkestr import OrkestrClient, Sandbox, Volume
from orkestr.errors import APIError, OrkestrError, SandboxNotFound, SandboxNotReady

from orkestr_console.runner.programs import agent_is_ready
from tests.clients.making import Sandboxes
from tests.stack import Stack, wait_for


@pytest.fixture(autouse=True)
def no_volume_stays(sdk: OrkestrClient) -> Iterator[None]:
    others = {volume.id for volume in Volume.list(client=sdk)}
    yield
    for volume in Volume.list(client=sdk):
        if volume.id in others:
            continue
        if volume.attached_sandbox_id is not None:
            Sandbox.get(volume.attached_sandbox_id, client=sdk).terminate()
        # Its sandbox ends a moment later if a test has just killed the agent.
        wait_for(partial(is_deleted, volume.id, sdk), 60)


def is_deleted(volume_id: str, sdk: OrkestrClient) -> bool:
    try:
        Volume.delete(volume_id, client=sdk)
    except SandboxNotReady:
        return False
    return True


def test_what_is_on_a_volume_outlives_its_sandbox(
    stack: Stack, sandboxes: Sandboxes, sdk: OrkestrClient
) -> None:
    volume = Volume.create("data", size_gb=0.25, max_lifetime_hours=2, client=sdk)
    assert (volume.size_mb, volume.status, volume.attached_sandbox_id) == (256, "available", None)
    assert volume.expires_at is not None
    left = datetime.fromisoformat(volume.expires_at) - datetime.now(UTC)
    assert timedelta(hours=1.9) < left < timedelta(hours=2)
    changed = Volume.update(volume.id, max_lifetime_hours=None, client=sdk)
    assert (changed.max_lifetime_hours, changed.expires_at) == (None, None)
    first = sandboxes.boot("debian-12", volume="data")
    assert first.volume == "data"
    # By the files' own calls, too.
    first.files.write("/persist/file", "kept")
    [listed] = [one for one in Volume.list(client=sdk) if one.id == volume.id]
    assert (listed.status, listed.attached_sandbox_id) == ("attached", first.id)
    refusals: list[Callable[[], object]] = [
        lambda: sandboxes.boot("debian-12", volume=volume.id),
        lambda: Volume.delete(volume.id, client=sdk),
        lambda: Volume.move(volume.id, "local", client=sdk),
    ]
    for refused in refusals:
        with pytest.raises(SandboxNotReady, match="is in use by the sandbox"):
            refused()
    # Paused and resumed, with the agent killed in between.
    first.pause()
    old = stack.pid("agent")
    stack.kill("agent")
    stack.wait_until_restarted("agent", old)
    wait_for(lambda: agent_is_ready(stack.layout.host_socket), 60, stack.explain)
    resumed = Sandbox.resume(first.id, client=sdk)
    assert resumed.exec("cat /persist/file; echo more >>/persist/file").stdout == "kept"
    first.terminate()
    second = sandboxes.boot("python-3.12", volume=volume.id)
    assert second.files.read("/persist/file") == "keptmore\n"
    second.terminate()
    assert Volume.move(volume.id, "local", client=sdk).region == "local"
    with pytest.raises(APIError, match="not a region"):
        Volume.move(volume.id, "mars", client=sdk)
    Volume.delete(volume.id, client=sdk)
    Volume.delete(volume.id, client=sdk)
    with pytest.raises(SandboxNotFound):
        sandboxes.boot("debian-12", volume=volume.id)
    with stack.host() as host:
        assert [info for info in host.volumes() if info.id == volume.id] == []


def test_of_two_creates_at_once_one_gets_the_volume(
    sandboxes: Sandboxes, sdk: OrkestrClient
) -> None:
    def create(_: int) -> str:
        try:
            return str(sandboxes.boot("debian-12", volume="shared").id)
        except OrkestrError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(create, range(4)))
    assert sum("'shared' is in use" in outcome for outcome in outcomes) == 3, outcomes
    [volume] = [one for one in Volume.list(client=sdk) if one.name == "shared"]
    assert volume.size_mb == 10_240
    assert volume.attached_sandbox_id in outcomes
