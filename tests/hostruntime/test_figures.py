"""What a container is told of its size and use: the texts, and the files that they are kept in."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostruntime.container import cgroups, figure_files, figures
from hostruntime.container.cgroups import CgroupLayout, ContainerGroups
from hostruntime.container.figure_files import FigureFiles
from hostruntime.container.figures import TARGETS
from hostruntime.container.limits import Limits

MIB = 1024 * 1024
SLOT = 7
# memory.stat of v2 and of v1, in bytes.
STATS = (
    {"anon": 30 * MIB, "file": 90 * MIB, "shmem": 10 * MIB, "inactive_file": 60 * MIB}
    | {"active_file": 20 * MIB, "slab_reclaimable": 5 * MIB, "slab_unreclaimable": MIB},
    {"total_rss": 30 * MIB, "total_cache": 90 * MIB, "total_shmem": 10 * MIB}
    | {"total_inactive_file": 60 * MIB, "total_active_file": 20 * MIB, "inactive_file": MIB},
)


def read_meminfo(text: str) -> dict[str, int]:
    """In MiB; proc_meminfo(5)."""
    fields = (line.split() for line in text.splitlines())
    return {name.rstrip(":"): int(value) // 1024 for name, value, _ in fields}


@pytest.mark.parametrize(("stat", "slab"), [(STATS[0], 5), (STATS[1], 0)], ids=["v2", "v1"])
def test_memory_is_the_limit_and_what_the_group_uses(stat: dict[str, int], slab: int) -> None:
    told = read_meminfo(figures.meminfo(512 * MIB, 130 * MIB, stat))
    assert (told["MemTotal"], told["MemFree"]) == (512, 382)
    assert told["MemAvailable"] == 382 + 80 + slab
    assert (told["AnonPages"], told["Cached"], told["Shmem"]) == (30, 90, 10)
    assert (told["SwapTotal"], told["SwapFree"], told["SReclaimable"]) == (0, 0, slab)


def test_memory_beyond_the_limit_is_none_at_all() -> None:
    told = read_meminfo(figures.meminfo(64 * MIB, 65 * MIB, {"active_file": 70 * MIB}))
    assert (told["MemFree"], told["MemAvailable"]) == (0, 64)


@pytest.mark.parametrize(
    ("cpu", "cpus"), [(0.1, 1), (1.0, 1), (1.1, 2), (3.0, 3), (0.1 * 3 + 0.7, 1), (99.0, 4)]
)
def test_a_part_of_a_cpu_is_one_and_none_has_more_than_the_machine(
    monkeypatch: pytest.MonkeyPatch, cpu: float, cpus: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert figures.cpus_of(cpu) == cpus
    assert set(figures.variables(cpu).values()) == {str(cpus)}


def test_only_so_many_cpus_are_listed() -> None:
    host = "".join(f"processor\t: {n}\nmodel name\t: x\n\n" for n in range(4)) + "Hardware\t: y\n"
    assert figures.cpuinfo(host, 2) == host[: host.index("processor\t: 2")]
    assert (figures.online(1), figures.online(3)) == ("0\n", "0-2\n")
    text = figures.stat(figures.CpuTimes(3_000_000, 1_000_000, 8_000_000), 2, 1_700_000_000, 5)
    lines = text.splitlines()
    ticks = 1_000_000 // figures.TICK_US
    assert lines[0].split() == ["cpu", *map(str, (3 * ticks, 0, ticks, 8 * ticks)), *"000000"]
    assert [line.split()[0] for line in lines[:4]] == ["cpu", "cpu0", "cpu1", "intr"]
    assert lines[2].split()[4] == str(4 * ticks)
    assert "btime 1700000000" in lines
    assert figures.idle_of(text) == 8_000_000


def test_the_load_follows_what_is_wanted_and_decays() -> None:
    loads = figures.NO_LOAD
    for _ in range(30):
        loads = figures.decayed(loads, 2.0, 2.0)
    assert 2.0 > loads[0] > 1.2 > loads[1] > loads[2] > 0.1
    text = figures.loadavg(loads, 2.0, 9)
    assert text.split()[3:] == ["2/9", "9"]
    assert figures.loads_of(text) == pytest.approx(loads, abs=0.01)
    for _ in range(1000):
        loads = figures.decayed(loads, 0.0, 2.0)
    assert loads[0] < 0.005 < loads[2]
    # A long time at once is the same as in pieces.
    assert figures.decayed(figures.NO_LOAD, 1.0, 60.0)[0] == pytest.approx(0.632, abs=0.001)


@pytest.mark.parametrize("text", ["", "nothing", "cpu", "cpu 1"])
def test_what_is_no_text_of_ours_tells_nothing(text: str) -> None:
    assert figures.idle_of(text) == 0
    assert figures.loads_of(text) == figures.NO_LOAD


# The files ---------------------------------------------------------------------------------------


class World:
    """A container of half a gigabyte and 1.5 CPUs whose control groups are plain files, and time.

    The layout is that of v2.
    """

    def __init__(self, root: Path) -> None:
        self.now = 1000.0
        (root / "figures").mkdir()
        self.files = FigureFiles(root / "figures")
        layout = CgroupLayout("v2", root / "cgroup", {}, (root / "cgroup",))
        self.groups = ContainerGroups(layout, "ork0-x")
        self.groups.unified.mkdir(parents=True)
        self.limits = Limits(cpu=1.5, memory_mb=512)
        # What has been read of CPU times already, by slot.
        self.read: dict[int, int] = {}
        self.uses()

    def uses(self, used: int = 0, throttled: int = 0, stalled: int = 0, memory: int = 0) -> None:
        """In seconds and MiB, since it began."""
        lines = {"usage": used, "user": used, "system": 0, "throttled": throttled}
        stat = "".join(f"{name}_usec {value * 1_000_000}\n" for name, value in lines.items())
        self._put("cpu.stat", stat)
        idle = "avg10=0.00 avg60=0.00 avg300=0.00"
        self._put("cpu.pressure", f"some {idle} total={stalled * 1_000_000}\nfull {idle} total=0\n")
        self._put("memory.current", f"{memory * MIB}\n")
        self._put("memory.stat", f"anon {memory * MIB}\nfile 0\n")
        self._put("pids.current", "5\n")

    def _put(self, name: str, text: str) -> None:
        (self.groups.unified / name).write_text(text)

    def create(self) -> None:
        self.files.create(SLOT, self.limits, self.groups)

    def after(self, seconds: float) -> None:
        self.now += seconds
        self.files.refresh(self.read)

    def told(self, name: str) -> str:
        return (self.files.of(SLOT) / name).read_text()

    @property
    def load(self) -> float:
        return float(self.told("loadavg").split()[0])


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(figure_files, "_host_cpuinfo", lambda: "processor\t: 0\n\n" * 4)
    made = World(tmp_path)
    monkeypatch.setattr(time, "monotonic", lambda: made.now)
    yield made


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_a_container_begins_with_all_files_which_nobody_else_can_write(
    world: World, umask: int
) -> None:
    before = os.umask(umask)
    try:
        world.create()
    finally:
        os.umask(before)
    assert world.files.of(SLOT).stat().st_mode & 0o7777 == 0o755
    found = {path.name: path.stat() for path in world.files.of(SLOT).iterdir()}
    assert found.keys() == TARGETS.keys()
    assert {status.st_mode & 0o7777 for status in found.values()} == {0o444}
    assert world.told("online") == "0-1\n"
    assert world.told("cpuinfo").count("processor") == 2
    assert read_meminfo(world.told("meminfo"))["MemFree"] == 512
    assert world.load == 0.0


def test_figures_follow_in_the_very_files_that_are_mounted(world: World) -> None:
    world.create()
    before = {name: (world.files.of(SLOT) / name).stat().st_ino for name in TARGETS}
    world.uses(used=2, memory=300)
    world.after(2.0)
    assert read_meminfo(world.told("meminfo"))["MemFree"] == 212
    user, _, _, idle = map(int, world.told("stat").split()[1:5])
    assert (user * figures.TICK_US, idle * figures.TICK_US) == (2_000_000, 2_000_000)
    assert 0.0 < world.load < 0.1
    assert {name: (world.files.of(SLOT) / name).stat().st_ino for name in TARGETS} == before


@pytest.mark.parametrize("waits", [{"throttled": 60}, {"stalled": 60}], ids=["limit", "neighbours"])
def test_who_waits_for_a_cpu_is_load_as_well(world: World, waits: dict[str, int]) -> None:
    world.create()
    world.uses(used=60, **waits)
    world.after(60.0)
    assert world.load == pytest.approx(2 * 0.632, abs=0.01)


def test_no_more_is_wanted_than_there_are_processes(world: World) -> None:
    world.create()
    world.uses(used=60, throttled=6000)
    world.after(60.0)
    assert world.load == pytest.approx(5 * 0.632, abs=0.01)


@pytest.mark.parametrize("spare", [False, True], ids=["idle", "spare"])
def test_an_idle_container_costs_no_reading_and_no_writing(
    world: World, monkeypatch: pytest.MonkeyPatch, *, spare: bool
) -> None:
    world.files.create(SLOT, world.limits, world.groups, spare=spare)
    world.read = {} if spare else {SLOT: 0}
    with monkeypatch.context() as patched:
        patched.setattr(figure_files, "_write", _never)
        patched.setattr(cgroups, "_read_at_once", _never)
        for _ in range(3):
            world.after(1800.0)
    # And nobody sees those hours when it wakes up.
    world.uses(used=1)
    world.read = {SLOT: 1_000_000}
    world.after(2.0)
    assert int(world.told("stat").split()[4]) * figures.TICK_US == 3_000_000
    assert world.load == pytest.approx(0.5 * 0.033, abs=0.01)


def test_a_load_decays_without_anything_else_being_written(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.create()
    world.uses(used=60)
    world.after(60.0)
    stat, load = world.told("stat"), world.load
    monkeypatch.setattr(ContainerGroups, "memory_stat", _never)
    world.after(60.0)
    assert world.load == pytest.approx(load / 2.718, abs=0.01)
    assert world.told("stat") == stat


def _never(*arguments: object) -> None:
    raise AssertionError(arguments)


def test_the_next_agent_goes_on_where_the_last_was_killed(world: World) -> None:
    world.create()
    world.uses(used=60)
    world.after(60.0)
    stat, load = world.told("stat"), world.load
    (world.files.directory / "9").mkdir()
    world.files = FigureFiles(world.files.directory)
    world.files.adopt(SLOT, world.limits, world.groups)
    world.files.remove_left()
    assert [path.name for path in world.files.directory.iterdir()] == [str(SLOT)]
    world.uses(used=61)
    world.after(2.0)
    user, _, _, idle = map(int, world.told("stat").split()[1:5])
    assert user * figures.TICK_US == 61_000_000
    assert idle >= int(stat.split()[4])
    # And not as if it had used a minute in those two seconds.
    assert world.load == pytest.approx(load, abs=0.02)


def test_a_container_of_a_version_without_figures_goes_on_without_them(world: World) -> None:
    world.files.adopt(SLOT, world.limits, world.groups)
    world.after(2.0)
    assert list(world.files.directory.iterdir()) == []
    world.files.remove(SLOT)


def test_one_that_ends_meanwhile_or_fails_stops_no_other(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = world.groups.layout
    for slot, name in ((1, "ork0-ended"), (2, "ork0-failing")):
        world.files.create(slot, world.limits, ContainerGroups(layout, name))
    (layout.unified / "ork0" / "ork0-failing").mkdir()
    (layout.unified / "ork0" / "ork0-failing" / "cpu.stat").write_text("usage_usec 5\nuser_usec x")
    world.create()
    world.uses(used=1, memory=12)
    world.after(2.0)
    assert read_meminfo(world.told("meminfo"))["MemFree"] == 500
    for slot in (1, 2, SLOT, SLOT):
        world.files.remove(slot)
    assert list(world.files.directory.iterdir()) == []


def test_neither_an_agent_nor_an_end_fails_for_what_another_version_left(world: World) -> None:
    world.create()
    (world.files.of(SLOT) / "stat").write_text("cpu 1 2 3 x\n")
    (world.files.of(SLOT) / "swaps").touch()
    world.files = FigureFiles(world.files.directory)
    world.files.adopt(SLOT, world.limits, world.groups)
    world.files.remove(SLOT)
    assert list(world.files.directory.iterdir()) == []


def test_the_next_container_of_a_slot_has_files_of_its_own(world: World) -> None:
    """Even if nobody has removed the last one's: it may still be mounted."""
    world.create()
    with (world.files.of(SLOT) / "meminfo").open() as last:
        world.create()
        assert os.fstat(last.fileno()).st_nlink == 0
    world.uses(used=1, memory=12)
    world.after(2.0)
    assert read_meminfo(world.told("meminfo"))["MemFree"] == 500
