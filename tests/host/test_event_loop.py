"""The agent's event loop waits for no disk: everybody waits for whatever it waits for."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from hostruntime.client.async_host_client import AsyncHostClient
from hostruntime.errors import CwdNotFound, ExecTimeout, HostError
from hostruntime.host.paths import StatePaths
from hostruntime.wire.builds import Cache, StartBuild
from hostruntime.wire.commands import Exec
from hostruntime.wire.files import WantedPart
from hostruntime.wire.reconciliation import Claim, Reconcile
from hostruntime.wire.sandboxes import CreateSandbox, SandboxInfo
from tests.host.agent import Agent, eventually, init_of
from tests.host.background import begin, ended, frames_of, on_loop
from tests.host.client import HostClient
from tests.host.conftest import BASE, NewSandbox
from tests.host.small import IMAGE, a_small_agent
from tests.host.test_reserve import disk as disk
from tests.host.watched import watched

pytestmark = [pytest.mark.host]

STEPS = ["sleep 1; echo a | tee /root/a", "echo b >/root/b", "echo c >/tmp/c"]
CLAIM = Claim("ins_watched", 1, "mark", "")


@pytest.fixture
def other_installation(agent: Agent) -> Iterator[None]:
    """The state directory, which others use too, may be given to another database in here."""
    file = StatePaths(agent.state).installation_file
    before = file.read_bytes() if file.exists() else None
    yield
    file.unlink(missing_ok=True)
    if before is not None:
        file.write_bytes(before)


def a_life_of_sandboxes(agent: Agent, made: NewSandbox) -> None:
    host = agent.client
    one = made(network="restricted", allow_domains=["pypi.test"], env={"A": "1"})
    host.exec(one.id, Exec(["echo", "42"]))
    with pytest.raises(ExecTimeout):
        host.exec(one.id, Exec(["sleep", "60"], timeout_seconds=1))
    host.write_file(one.id, "/workspace/a", b"content", mode=None)
    host.stat(one.id, "/workspace/a")
    host.move(one.id, "/workspace/a", "/workspace/b")
    host.mkdir(one.id, "/workspace/c")
    host.delete_path(one.id, "/workspace/c")
    host.set_deadline(one.id, time.time() + 600)
    host.pause_sandbox(one.id, time.time() + 600)
    host.resume_sandbox(one.id, None)
    some_commands_behind(agent, one)
    a_transfer(agent, one)
    host.create_snapshot("snp_watched", one.id)
    two = made(image="", snapshot="snp_watched")
    host.background_commands(two.id)
    host.snapshots()
    host.delete_snapshot("snp_watched")
    ends, exits = made(deadline=time.time() + 1), made()
    os.kill(init_of(agent, exits.id), signal.SIGKILL)
    for _ in eventually():
        if {host.sandbox(ended.id).state for ended in (ends, exits)} == {"gone"}:
            break
    host.delete_sandbox(ends.id)
    host.delete_sandbox(one.id)
    host.usage()
    host.usage(two.id)
    host.metrics(two.id)
    host.commands()
    host.changes("", 0, seconds=0.0)
    host.acknowledge_usage([one.id, ends.id])


def some_commands_behind(agent: Agent, sandbox: SandboxInfo) -> None:
    host = agent.client
    short, long = begin(host, sandbox, "echo 42"), begin(host, sandbox, "exec sleep 600")
    on_loop(agent, lambda client: frames_of(client, sandbox, short))
    ended(host, sandbox, short)
    host.background_commands(sandbox.id)
    host.kill_command(sandbox.id, long)
    with pytest.raises(CwdNotFound):
        begin(host, sandbox, "true", cwd="/nowhere")


def a_transfer(agent: Agent, sandbox: SandboxInfo) -> None:
    async def there_and_back(client: AsyncHostClient) -> None:
        path = "/workspace/transferred"
        await client.write_stream(sandbox.id, path, 7, content())
        async with client.read_part(sandbox.id, path, WantedPart()) as (_, parts):
            assert [part async for part in parts] == [b"content"]

    async def content() -> AsyncIterator[bytes]:
        yield b"content"

    on_loop(agent, there_and_back)


def some_builds(agent: Agent) -> None:
    host = agent.client
    # The directory has records of earlier runs: a build of a name that is known is not a new one.
    fails, made, cut = (f"img_{what}{time.time_ns():x}" for what in ("fails", "made", "cut"))
    options: dict[str, Any] = {
        "base_image": BASE,
        "network": "restricted",
        "cache": Cache("team_watched", reuse=True),
    }
    host.start_build(StartBuild(fails, recipe=[*STEPS, "exit 3"], **options))
    assert [event.kind for event in host.build_events(fails)][-1] == "failed"
    host.start_build(StartBuild(made, recipe=[*STEPS, "echo d >/root/d"], **options))
    kinds = [event.kind for event in host.build_events(made)]
    assert kinds[-1] == "published"
    assert "step_cached" in kinds
    host.start_build(StartBuild(cut, recipe=["sleep 60"], **options))
    host.cancel_build(cut)
    host.cancel_build("img_never")
    host.build(made)
    host.image_usage(made)
    host.delete_image(made)
    # Else the next run of this test reuses these steps, and writes no layer.
    shutil.rmtree(agent.state / "layers/team_watched", ignore_errors=True)


def what_operators_ask(host: HostClient) -> None:
    host.health()
    host.bases()
    list(host.ensure_base(BASE))
    host.image(BASE)
    host.default_domains()
    host.egress_hosts("sbx_one")
    host.installation()
    host.adopt(CLAIM)
    host.agree(CLAIM, known=True)
    images = [image.id for image in host.images()]
    host.reconcile(Reconcile(CLAIM, images, []))
    for held in host.quarantine():
        host.restore_quarantined(held.key)


@pytest.mark.usefixtures("other_installation")
def test_nothing_that_is_asked_of_an_agent_has_its_loop_wait_for_a_file(
    agent: Agent, new_sandbox: NewSandbox, tmp_path: Path
) -> None:
    touched = tmp_path / "touched"
    with watched(agent, touched):
        a_life_of_sandboxes(agent, new_sandbox)
        some_builds(agent)
        what_operators_ask(agent.client)
        stays = new_sandbox()
        # Another agent takes it up, and the loops of that one have their turns.
        agent.stop()
        agent.start()
        assert agent.client.sandbox(stays.id).state == "running"
        time.sleep(12)
    assert sorted(set(touched.read_text().splitlines())) == []


def a_sandbox(host: HostClient, name: str) -> SandboxInfo:
    return host.create_sandbox(CreateSandbox(f"sbx_{name}", image=IMAGE, cpu=1, memory_mb=512))


def test_a_disk_that_stands_still_keeps_only_those_who_wait_for_it(disk: Path) -> None:
    with a_small_agent(disk / "state") as agent:
        # What it says goes to the process manager, and not to a file.
        agent.stop()
        agent.log_path = disk.with_name("agent.log")
        agent.start()
        try:
            try_while_it_stands(agent, disk)
        except HostError as error:
            raise AssertionError(agent.log()[-3000:]) from error


def try_while_it_stands(agent: Agent, disk: Path) -> None:
    host = agent.client
    one, two = a_sandbox(host, "one"), a_sandbox(host, "two")
    changed = threading.Event()

    def change() -> None:
        with HostClient(agent.socket) as client:
            client.set_deadline(one.id, time.time() + 600)
            changed.set()

    subprocess.run(["fsfreeze", "--freeze", str(disk)], check=True)
    try:
        threading.Thread(target=change, daemon=True).start()
        assert not changed.wait(3)
        host.health(seconds=20)
        done = host.exec(two.id, Exec(["python3", "-c", "print(6 * 7)"]))
        assert done.stdout.decode().strip() == "42"
        assert not changed.is_set()
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", str(disk)], check=True)
    assert changed.wait(60)
