"""Commands in the background when something fails around them: what is left, and who waits."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hostruntime.container import supervisor
from hostruntime.container.command_log import LogWriter
from hostruntime.errors import ContainerGone, Exhausted
from hostruntime.host.paths import StatePaths
from hostruntime.sandbox import background
from hostruntime.sandbox.background import READS_PER_SECOND, BackgroundCommands, Launch

SANDBOX, COMMAND = "sbx_1", "cmd_1"
LAUNCH = Launch(COMMAND, "true", ["true"], "/", {})


class Containers:
    """One container, whose supervisors die, or which has just ended."""

    def __init__(self, disks: Path) -> None:
        self.disks = SimpleNamespace(path=lambda owner: disks / owner)
        self.launchers = self
        self.gone = False

    def get(self, owner: str) -> Any:
        if self.gone:
            raise ContainerGone("It has just ended.")
        spec = SimpleNamespace(limits=SimpleNamespace(cpu=1.0))
        slot = SimpleNamespace(mode="off")
        return SimpleNamespace(name=self.name_of(owner), slot=slot, spec=spec)

    def name_of(self, owner: str) -> str:
        return f"ork15-test-{owner}"

    def environment(self, *_: object) -> dict[str, str]:
        return {}

    async def supervise(self, _: object, descriptors: list[int], __: int) -> bytes:
        while descriptors:
            os.close(descriptors.pop())
        return b""


@pytest.fixture
def containers(tmp_path: Path) -> Containers:
    (tmp_path / "disks" / SANDBOX).mkdir(parents=True)
    return Containers(tmp_path / "disks")


@pytest.fixture
def commands(tmp_path: Path, containers: Containers) -> BackgroundCommands:
    paths = StatePaths(tmp_path / "state").ensure()
    (paths.sandboxes / SANDBOX).mkdir()
    return BackgroundCommands(paths, containers)  # type: ignore[arg-type]


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The groups that were killed."""
    names: list[str] = []

    async def kill_tree(group: Path) -> None:
        names.append(group.name)

    monkeypatch.setattr(background, "kill_group", lambda group: names.append(group.name))
    monkeypatch.setattr(background, "kill_tree", kill_tree)
    return names


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


async def test_a_sandbox_that_ends_as_a_command_starts_costs_no_descriptor(
    commands: BackgroundCommands, containers: Containers
) -> None:
    containers.gone = True
    counts = []
    for _ in range(4):
        with pytest.raises(ContainerGone):
            await commands.start(SANDBOX, LAUNCH)
        counts.append(open_descriptors())
    # What the event loop needs is there after the first.
    assert counts[-1] <= counts[0]


async def test_a_command_whose_supervisor_died_as_it_started_is_killed(
    commands: BackgroundCommands, killed: list[str]
) -> None:
    """It may run by then, and whoever asked for it is told that it does not."""
    with pytest.raises(Exhausted):
        await commands.start(SANDBOX, LAUNCH)
    assert killed == [f"background-{COMMAND}"]


async def test_what_a_killed_supervisor_leaves_is_killed_although_nobody_asks(
    commands: BackgroundCommands, killed: list[str]
) -> None:
    descriptors: list[int] = []
    commands._create_files(SANDBOX, LAUNCH, descriptors)
    # As a new agent finds it.
    await commands.recover(SANDBOX)
    log, status = descriptors
    os.pwrite(status, b'{"pid": 7}', 0)
    await asyncio.sleep(1)
    assert killed == []
    for each in (status, log):
        os.close(each)
    async with asyncio.timeout(20):
        while not killed:
            await asyncio.sleep(0.01)
        while commands.watch.watched:
            await asyncio.sleep(0.01)
    assert killed == [f"background-{COMMAND}"]
    await commands.close()


async def test_those_that_are_looked_after_end_with_the_agent_or_their_files(
    commands: BackgroundCommands,
) -> None:
    async with started(commands):
        await commands.recover(SANDBOX)
        await asyncio.sleep(0.1)
        await commands.close()
        assert commands._guards == {}
        await commands.recover(SANDBOX)
        commands._forget(SANDBOX, COMMAND)
        async with asyncio.timeout(20):
            while commands._guards:
                await asyncio.sleep(0.01)
    await commands.close()


@asynccontextmanager
async def started(commands: BackgroundCommands) -> AsyncIterator[Sequence[int]]:
    """A command that runs as far as its files tell: the log and the status."""
    commands._make_room(SANDBOX)
    descriptors: list[int] = []
    commands._create_files(SANDBOX, LAUNCH, descriptors)
    try:
        yield descriptors
    finally:
        for each in descriptors:
            os.close(each)


async def test_a_full_disk_of_the_host_keeps_nobody_from_killing(
    commands: BackgroundCommands, killed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(background, "is_populated", lambda _: not killed)
    monkeypatch.setattr(background, "_STOP_SECONDS", 0.1)
    async with started(commands):
        monkeypatch.setattr(background, "write_json", fail)
        await commands.kill(SANDBOX, COMMAND)
    assert killed == [f"background-{COMMAND}"]


async def test_a_command_that_enters_only_after_it_was_to_be_killed_is_killed(
    commands: BackgroundCommands, killed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = iter([False, False, True])
    monkeypatch.setattr(background, "is_populated", lambda _: next(looks, False))
    monkeypatch.setattr(background, "_STOP_SECONDS", 0.5)
    async with started(commands):
        await commands.kill(SANDBOX, COMMAND)
    assert killed == [f"background-{COMMAND}"]


async def test_many_who_follow_one_sandbox_slow_down_no_other(
    commands: BackgroundCommands, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr("hostruntime.sandbox.background.asyncio.sleep", sleep)
    commands._followers["sbx_neighbour"] = background.MAX_FOLLOWERS
    async with started(commands) as (log, _):
        writer = LogWriter(log)
        async with aclosing(commands.follow(SANDBOX, COMMAND, 0, 60)) as frames:
            for _ in range(2):
                writer.write(b"on")
                assert (await anext(frames)).data == b"on"
    commands.watch.close()
    # One of two sandboxes that are followed, by one.
    assert waited[0] == pytest.approx(2 / READS_PER_SECOND)


def test_a_supervisor_outlives_a_full_disk_of_the_host() -> None:
    """Its status cannot be written then; the command is to run on."""
    script = """\
import os
from hostruntime.container import supervisor
os.dup2(os.open("/dev/full", os.O_WRONLY), supervisor._STATUS)
supervised = supervisor._Supervised.__new__(supervisor._Supervised)
supervised.pid_inside = 7
supervised.write_status(status=0)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])


def test_a_supervisor_reads_many_small_pieces_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of its turns is charged to nobody, and wakes whoever follows."""
    out, out_in = os.pipe()
    with (tmp_path / "log").open("wb+") as log:
        supervised = supervisor._Supervised.__new__(supervisor._Supervised)
        supervised.output, supervised.printing = out, True
        supervised.log = LogWriter(log.fileno())
        pieces, turns = iter([b"x"] * 1000), 0

        def go_on(seconds: float) -> None:
            # Somebody who prints ten thousand pieces a second.
            for _ in range(int(seconds * 10_000)):
                os.write(out_in, next(pieces, b""))

        monkeypatch.setattr("hostruntime.container.supervisor.time.sleep", go_on)
        os.write(out_in, next(pieces))
        while supervised.log.size < 1000 and turns < 1000:
            turns += 1
            supervised._read()
            # If it did not wait, it finds the next one.
            if supervised.log.size == turns:
                os.write(out_in, next(pieces, b""))
        assert turns < 100
    os.close(out)
    os.close(out_in)
