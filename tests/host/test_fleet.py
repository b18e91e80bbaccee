"""Many sandboxes: what each costs does not depend on the others, and too many are refused."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostruntime.container.disk import Disks
from hostruntime.container.rootfs import RootfsPlan, id_extents, mount_rootfs, unmount_rootfs
from hostruntime.errors import HostFull, ImageNotFound
from hostruntime.host import kernel
from hostruntime.host.paths import StatePaths, claim_instance, release_instance
from hostruntime.host.rundir import RunDir
from hostruntime.network.policy import Mode, Policy
from hostruntime.network.slots import SlotPool
from hostruntime.sandbox.warm_pool import SETTING
from hostruntime.wire.builds import StartBuild
from hostruntime.wire.sandboxes import CreateSandbox
from tests.host.agent import Agent
from tests.host.counts import settled
from tests.host.network import SETTINGS
from tests.host.small import IMAGE, a_small_agent
from tests.host.warm import is_from_warm, wait_for_warm

pytestmark = pytest.mark.host
NETWORKS = ("off", "restricted", "open")


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    with a_small_agent(tmp_path_factory.mktemp("fleet") / "state") as agent:
        yield agent


def create(agent: Agent, name: str, network: str = "off", memory_mb: int = 64) -> None:
    agent.client.create_sandbox(
        CreateSandbox(name, image=IMAGE, cpu=0.1, memory_mb=memory_mb, network=network)
    )


def restart(agent: Agent, **settings: str) -> None:
    agent.stop()
    agent.environment = {SETTING: "0", **settings}
    agent.start()


def made(agent: Agent) -> list[str]:
    """All that a refused sandbox could leave in the state and run directories."""
    run = Path("/run/orkestr") / str(agent.client.health().instance)
    places = (agent.state / "sandboxes", agent.state / "disks", run / "roots", run / "slots")
    return sorted(str(path) for place in places for path in place.iterdir())


@pytest.mark.parametrize("network", NETWORKS)
def test_each_idle_sandbox_has_three_mounts_of_the_hosts(agent: Agent, network: str) -> None:
    """Disk, network and runtime layer: whatever starts begins with a copy of all mounts."""
    before = settled(agent)
    names = [f"sbx_{network}{number}" for number in range(4)]
    try:
        for name in names:
            create(agent, name, network)
        assert settled(agent)["mounts"] - before["mounts"] == 3 * len(names)
    finally:
        for name in names:
            agent.client.delete_sandbox(name)
    assert settled(agent)["mounts"] == before["mounts"]


def test_a_runtime_layer_stays_as_long_as_a_sandbox_uses_it(agent: Agent) -> None:
    """Though all else that it is mounted on is its own alone."""
    runtime = StatePaths(agent.state).runtime
    before = set(runtime.iterdir())
    agent.client.create_sandbox(
        CreateSandbox(
            "sbx_layer",
            image=IMAGE,
            cpu=0.1,
            memory_mb=64,
            network="restricted",
            allow_domains=["example.org"],
        )
    )
    own = set(runtime.iterdir()) - before
    assert own
    for tree in own:
        os.utime(tree, (0, 0))
    restart(agent)
    assert own <= set(runtime.iterdir())
    agent.client.delete_sandbox("sbx_layer")
    for tree in own:
        os.utime(tree, (0, 0))
    restart(agent)
    assert not own & set(runtime.iterdir())


def test_what_is_one_too_many_is_refused_before_anything_is_made(agent: Agent) -> None:
    restart(agent, ORKESTR_MAX_SANDBOXES="2")
    create(agent, "sbx_first")
    create(agent, "sbx_second")
    before = made(agent)
    with pytest.raises(HostFull, match="ORKESTR_MAX_SANDBOXES"):
        create(agent, "sbx_third")
    with pytest.raises(HostFull, match="ORKESTR_MAX_SANDBOXES"):
        agent.client.start_build(
            StartBuild(
                "img_third", base_image=IMAGE, recipe=["true"], network="off", cpu=0.1, memory_mb=64
            )
        )
    assert made(agent) == before
    assert list((agent.state / "builds").iterdir()) == []
    assert [one.id for one in agent.client.sandboxes()] == ["sbx_first", "sbx_second"]
    agent.client.delete_sandbox("sbx_first")
    create(agent, "sbx_third")
    capacity = agent.client.health().capacity
    assert capacity is not None
    assert (capacity.containers, capacity.max_containers, capacity.memory_mb) == (2, 2, 128)


def test_what_runs_counts_after_a_restart_and_a_failed_start_does_not(agent: Agent) -> None:
    restart(agent, ORKESTR_MEMORY_OVERCOMMIT="0.1")
    capacity = agent.client.health().capacity
    assert capacity is not None
    assert capacity.containers == 2
    left = capacity.max_memory_mb - capacity.memory_mb
    with pytest.raises(HostFull, match="ORKESTR_MEMORY_OVERCOMMIT"):
        create(agent, "sbx_large", memory_mb=left + 1)
    for _ in range(3):
        with pytest.raises(ImageNotFound):
            agent.client.create_sandbox(
                CreateSandbox("sbx_none", image="no_such_image", cpu=0.1, memory_mb=left)
            )
    still = agent.client.health().capacity
    assert still is not None
    assert (still.containers, still.memory_mb) == (2, capacity.memory_mb)
    for name in ("sbx_second", "sbx_third"):
        agent.client.delete_sandbox(name)
    after = agent.client.health().capacity
    assert after is not None
    assert (after.containers, after.memory_mb, after.cpu) == (0, 0, 0)


def test_warm_containers_count_once_a_sandbox_has_taken_one(agent: Agent) -> None:
    restart(agent, **{SETTING: "2", "ORKESTR_MAX_SANDBOXES": "1"})
    create(agent, "sbx_cold")
    agent.client.delete_sandbox("sbx_cold")
    wait_for_warm(agent)
    capacity = agent.client.health().capacity
    assert capacity is not None
    assert capacity.containers == 0
    create(agent, "sbx_warm")
    assert is_from_warm(agent, "sbx_warm")
    with pytest.raises(HostFull, match="ORKESTR_MAX_SANDBOXES"):
        create(agent, "sbx_more")
    agent.client.delete_sandbox("sbx_warm")
    create(agent, "sbx_more")
    agent.client.delete_sandbox("sbx_more")
    restart(agent)


@pytest.fixture
def paths(tmp_path: Path) -> StatePaths:
    return StatePaths(tmp_path / "state").ensure()


def test_starts_and_stops_do_not_read_the_mounts_of_all(
    paths: StatePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are thousands: reading them for each container takes the square of their number."""
    instance = claim_instance(paths)
    pool = SlotPool(paths, instance, SETTINGS, 8)
    disks, roots = Disks(paths, instance), RunDir.of(instance).roots
    trees = [paths.root / name for name in ("image", "runtime")]
    for tree in trees:
        (tree / "sys").mkdir(parents=True)
    try:
        pool.setup()
        with monkeypatch.context() as patched:
            patched.setattr(kernel, "mount_points_under", _never)
            slot = pool.acquire("mine", Policy("off"))
            writable = disks.attach("mine", 64)
            image, runtime = trees
            plan = RootfsPlan(roots / "mine", image, runtime, writable, slot.sysfs, slot.id_base)
            extents = id_extents(slot.id_base)
            assert mount_rootfs(plan, kernel.create_user_namespace(extents)).is_mount()
            unmount_rootfs(plan.mounts)
            disks.release("mine")
            pool.release("mine")
        assert not plan.mounts.exists()
        assert disks.owners() == set()
    finally:
        pool.teardown()
        release_instance(paths)


def _never(root: Path) -> list[Path]:
    raise AssertionError(f"the mounts of the whole machine are read, for {root}")


def test_an_agent_adopts_slots_without_starting_programs(
    paths: StatePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two for each of a thousand would keep everybody waiting for a minute."""
    instance = claim_instance(paths)
    owners = {"one", "two"}
    first, second = (SlotPool(paths, instance, SETTINGS, 8) for _ in range(2))
    try:
        first.setup()
        slots = [first.acquire(owner, Policy("off")) for owner in sorted(owners)]
        first.close()
        monkeypatch.setattr(subprocess, "Popen", _no_program)
        for owner, slot in zip(sorted(owners), slots, strict=True):
            second._adopt(owner, slot)
        assert [second.slot_of(owner) for owner in sorted(owners)] == slots
    finally:
        monkeypatch.undo()
        second.teardown()
        release_instance(paths)


@pytest.mark.parametrize("mode", NETWORKS)
def test_a_slot_is_made_and_destroyed_without_starting_programs(
    paths: StatePaths, monkeypatch: pytest.MonkeyPatch, mode: Mode
) -> None:
    """There is one for each container: two programs took longer than everything else."""
    pool = SlotPool(paths, claim_instance(paths), SETTINGS, 8)
    try:
        pool.setup()
        # The process that loads rules is there from the first on.
        pool.acquire("first", Policy("off"))
        monkeypatch.setattr(subprocess, "Popen", _no_program)
        pool.acquire("one", Policy(mode))
        pool.release("one")
        assert pool.slot_of("one") is None
    finally:
        monkeypatch.undo()
        pool.teardown()
        release_instance(paths)


def _no_program(*argv: object, **options: object) -> None:
    raise AssertionError(f"a program is started: {argv}")
