"""How many warm containers of which shape there are, and what makes them give way."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from hostruntime.container.limits import Limits
from hostruntime.container.manager import ContainerSpec, RunningContainer
from hostruntime.errors import ContainerGone, HostFull, InvalidRequest
from hostruntime.host.paths import StatePaths
from hostruntime.image.trash import Trash
from hostruntime.network.policy import Policy
from hostruntime.network.slots import Slot
from hostruntime.sandbox import warm_pool
from hostruntime.sandbox.warm_pool import (
    MAX_WAIT_SECONDS,
    PREFIX,
    QUIET_SECONDS,
    SETTING,
    WarmPool,
    configured_maximum,
)

Times = list[float]


class Containers:
    """Counts what runs; ``slots`` is how many may."""

    def __init__(self) -> None:
        self.running: dict[str, ContainerSpec] = {}
        self.slots = 100
        self.disk_full = False
        self.dead: set[str] = set()
        self.on_exit: list[Callable[[str], Awaitable[None]]] = []
        self.stop_spare: Callable[[], Awaitable[bool]] | None = None
        self.starts = 0
        self.going = 0

    @property
    def disks(self) -> Containers:
        return self

    def require_space(self) -> None:
        if self.disk_full:
            raise HostFull("The disk is full.")

    async def start(self, spec: ContainerSpec) -> RunningContainer:
        await asyncio.sleep(0)
        while len(self.running) >= self.slots:
            if spec.spare or self.stop_spare is None or not await self.stop_spare():
                raise HostFull("All slots are taken.")
        self.starts += 1
        if self.going == spec.limits.memory_mb:
            # Its image is deleted while it starts.
            spec.image_tree.rmdir()
            raise FileNotFoundError(spec.image_tree)
        self.running[spec.owner] = spec
        return container(spec)

    async def pause(self, owner: str) -> None:
        assert owner in self.running

    async def stop(self, owner: str) -> None:
        await asyncio.sleep(0)
        self.running.pop(owner, None)

    async def hand_over(self, owner: str, spec: ContainerSpec) -> RunningContainer:
        if owner in self.dead:
            raise ContainerGone(f"{owner} has exited.")
        del self.running[owner]
        self.running[spec.owner] = spec
        return container(spec)

    def waiting(self) -> Counter[int]:
        """By memory, as the shapes here differ in that."""
        specs = (spec for owner, spec in self.running.items() if owner.startswith(PREFIX))
        return Counter(spec.limits.memory_mb for spec in specs)


def container(spec: ContainerSpec) -> RunningContainer:
    slot = Slot(0, spec.policy.mode, 0, None, None, None)
    return RunningContainer(spec.owner, spec.owner, slot, 1, time.time(), 1.0, spec)


@pytest.fixture
def containers(monkeypatch: pytest.MonkeyPatch) -> Containers:
    monkeypatch.setattr(warm_pool, "_CHECK_SECONDS", 0.02)
    monkeypatch.setattr(warm_pool, "write_identity", lambda tree, upper: None)
    monkeypatch.setattr(warm_pool, "available_memory_share", lambda: 0.5)
    return Containers()


@pytest.fixture
def pool(tmp_path: Path, containers: Containers) -> WarmPool:
    paths = StatePaths(tmp_path / "state").ensure()
    return WarmPool(paths, containers, Trash(paths), maximum=4)  # type: ignore[arg-type]


def spec(tmp_path: Path, owner: str, memory_mb: int = 128) -> ContainerSpec:
    tree = tmp_path / "tree"
    tree.mkdir(exist_ok=True)
    limits = Limits(cpu=1.0, memory_mb=memory_mb)
    return ContainerSpec(owner, tree, Policy("off"), limits, tmp_path / owner)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def test_the_first_is_started_and_the_next_is_claimed(
    tmp_path: Path, pool: WarmPool, containers: Containers
) -> None:
    pool.start()
    assert await pool.claim(spec(tmp_path, "first")) is None
    await until(lambda: pool.count() == 1)
    claimed = await pool.claim(spec(tmp_path, "second"))
    assert claimed is not None
    assert claimed.owner == "second"
    # Two were requested within a minute.
    await until(lambda: containers.waiting() == {128: 2})
    await pool.close()
    assert containers.waiting() == {}
    assert list(containers.running) == ["second"]


async def test_all_together_there_are_no_more_than_the_limit_and_the_latest_shapes_win(
    tmp_path: Path, pool: WarmPool, containers: Containers
) -> None:
    pool.start()
    for memory in (100, 200, 300, 400, 500):
        await pool.claim(spec(tmp_path, f"sbx{memory}", memory))
    await until(lambda: containers.waiting() == {200: 1, 300: 1, 400: 1, 500: 1})
    for number in range(3):
        await pool.claim(spec(tmp_path, f"more{number}", 300))
    # One of each of the four, and none is left for more of the one in demand.
    await until(lambda: containers.waiting() == {200: 1, 300: 1, 400: 1, 500: 1})
    await pool.close()


async def test_a_shape_nobody_asks_for_any_more_is_given_up(
    tmp_path: Path, pool: WarmPool, containers: Containers, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool.start()
    await pool.claim(spec(tmp_path, "first"))
    await until(lambda: pool.count() == 1)
    monkeypatch.setattr(warm_pool, "KEEP_SECONDS", 0.0)
    await until(lambda: not containers.running)
    await pool.close()


async def test_those_of_a_tree_that_is_gone_are_given_up_and_not_claimed(
    tmp_path: Path, pool: WarmPool, containers: Containers
) -> None:
    pool.start()
    await pool.claim(spec(tmp_path, "first"))
    await until(lambda: pool.count() == 1)
    [old] = containers.running
    (tmp_path / "tree").rmdir()
    # Another one by the same name, as after a restore.
    (tmp_path / "other").mkdir()
    (tmp_path / "other").rename(tmp_path / "tree")
    assert await pool.claim(spec(tmp_path, "second")) is None
    # One of the other takes its place, which nobody would claim.
    await until(lambda: old not in containers.running and pool.count() == 1)
    await pool.close()


async def test_one_whose_image_goes_while_it_starts_is_no_failure_and_keeps_no_other(
    tmp_path: Path, pool: WarmPool, containers: Containers, caplog: pytest.LogCaptureFixture
) -> None:
    gone = replace(spec(tmp_path, "gone", 100), image_tree=tmp_path / "gone")
    gone.image_tree.mkdir()
    for wanted in (spec(tmp_path, "stays", 200), gone):
        await pool.claim(wanted)
    containers.going = 100
    pool.maximum = 2
    pool.start()
    await until(lambda: containers.waiting() == {200: 1})
    await pool.close()
    assert "could not be maintained" not in caplog.text


@pytest.mark.parametrize("short_of", ["disk", "memory"])
async def test_all_give_way_when_the_machine_is_short_of_something(
    tmp_path: Path,
    pool: WarmPool,
    containers: Containers,
    monkeypatch: pytest.MonkeyPatch,
    short_of: str,
) -> None:
    pool.start()
    await pool.claim(spec(tmp_path, "first"))
    await until(lambda: pool.count() == 1)
    if short_of == "disk":
        containers.disk_full = True
    else:
        monkeypatch.setattr(warm_pool, "available_memory_share", lambda: 0.05)
    await until(lambda: not containers.running)
    await pool.close()


async def test_one_gives_way_to_a_sandbox_that_finds_no_slot(
    tmp_path: Path, pool: WarmPool, containers: Containers
) -> None:
    containers.slots = 2
    pool.start()
    await pool.claim(spec(tmp_path, "first"))
    await pool.claim(spec(tmp_path, "second"))
    await until(lambda: pool.count() == 2)
    for name in ("third", "fourth"):
        await containers.start(spec(tmp_path, name, 256))
    assert set(containers.running) == {"third", "fourth"}
    with pytest.raises(HostFull):
        await containers.start(spec(tmp_path, "fifth", 256))
    await pool.close()


async def test_one_that_has_died_is_stopped_and_the_next_is_taken(
    tmp_path: Path, pool: WarmPool, containers: Containers
) -> None:
    pool.start()
    await pool.claim(spec(tmp_path, "first"))
    await until(lambda: pool.count() == 1)
    (dead,) = containers.running
    containers.dead.add(dead)
    assert await pool.claim(spec(tmp_path, "second")) is None
    assert dead not in containers.running
    await pool.close()


async def test_one_that_exits_while_it_waits_is_replaced(
    tmp_path: Path, pool: WarmPool, containers: Containers
) -> None:
    pool.start()
    await pool.claim(spec(tmp_path, "first"))
    await until(lambda: pool.count() == 1)
    (dead,) = containers.running
    for callback in containers.on_exit:
        await callback(dead)
    await until(lambda: pool.count() == 1)
    assert dead not in containers.running
    await pool.close()


class Clock:
    """A clock that only sleeping advances; ``meanwhile`` is called every 30 ms of that."""

    def __init__(self, meanwhile: Callable[[], Awaitable[object]]) -> None:
        self.now = 1000.0
        self.meanwhile = meanwhile

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            self.now = min(self.now + 0.03, until)
            await self.meanwhile()


@pytest.fixture
def started_at(containers: Containers, monkeypatch: pytest.MonkeyPatch, pool: WarmPool) -> Times:
    """When containers were started, by the pool's clock, in seconds from the first claim."""
    times: Times = []
    start = containers.start

    async def timed(spec: ContainerSpec) -> RunningContainer:
        times.append(round(pool.clock() - 1000, 3))
        return await start(spec)

    monkeypatch.setattr(containers, "start", timed)
    return times


async def test_the_first_command_of_a_sandbox_does_not_compete_with_the_next_container(
    tmp_path: Path, pool: WarmPool, started_at: Times
) -> None:
    clock = Clock(partial(asyncio.sleep, 0))
    pool.clock, pool.sleep = clock, clock.sleep
    pool.start()
    await pool.claim(spec(tmp_path, "first"))
    await until(lambda: pool.count() == 1)
    assert started_at == [QUIET_SECONDS]
    await pool.close()


async def test_a_steady_stream_of_sandboxes_still_finds_containers(
    tmp_path: Path, pool: WarmPool, started_at: Times
) -> None:
    numbers = count()

    async def claim_another() -> None:
        await pool.claim(spec(tmp_path, f"sbx{next(numbers)}"))

    clock = Clock(claim_another)
    pool.clock, pool.sleep = clock, clock.sleep
    pool.start()
    await claim_another()
    await until(lambda: pool.count() == pool.maximum)
    # Having waited once, it does not wait again until all are there.
    assert started_at == [MAX_WAIT_SECONDS] * pool.maximum
    await pool.close()


async def test_without_any_nothing_is_started(tmp_path: Path, containers: Containers) -> None:
    paths = StatePaths(tmp_path / "state").ensure()
    pool = WarmPool(paths, containers, Trash(paths), maximum=0)  # type: ignore[arg-type]
    pool.start()
    assert await pool.claim(spec(tmp_path, "first")) is None
    await asyncio.sleep(0.1)
    assert containers.starts == 0
    await pool.close()


async def test_the_network_policy_is_part_of_the_shape(
    tmp_path: Path, pool: WarmPool, containers: Containers
) -> None:
    pool.start()
    await pool.claim(spec(tmp_path, "first"))
    await until(lambda: pool.count() == 1)
    other = replace(spec(tmp_path, "other"), policy=Policy("open"))
    assert await pool.claim(other) is None
    await pool.close()


def test_the_setting_is_a_number_or_by_the_machines_memory() -> None:
    assert configured_maximum({SETTING: "3"}) == 3
    assert configured_maximum({SETTING: "0"}) == 0
    assert 1 <= configured_maximum({}) <= 8
    for wrong in ("-1", "many", "1.5", "257", "9" * 5000):
        with pytest.raises(InvalidRequest, match=SETTING):
            configured_maximum({SETTING: wrong})
