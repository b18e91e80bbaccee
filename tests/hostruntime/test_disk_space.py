"""How much of a file system is reserved, and what that means for who wants some of it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from hostruntime.agent.ballast import Ballast, ballast_bytes
from hostruntime.agent.disk_monitor import Growth
from hostruntime.container.disk import Disks
from hostruntime.container.gate import Gate
from hostruntime.errors import Held, HostFull, HostUnavailable, InvalidRequest
from hostruntime.host.disk_space import DiskSpace, Level, _reserve_bytes
from hostruntime.host.paths import Instance, StatePaths

GIB, MIB = 1024**3, 1024**2
ROOM = DiskSpace(Path("/state"), 100 * GIB, 50 * GIB, 6_000_000, 3_000_000, 5 * GIB, 200_000)


@pytest.mark.parametrize(
    ("size", "kept"),
    [(1000 * GIB, 8 * GIB), (100 * GIB, 5 * GIB), (10 * GIB, GIB), (2 * GIB, int(0.4 * GIB))],
)
def test_a_twentieth_is_kept_within_bounds(size: int, kept: int) -> None:
    assert _reserve_bytes(size) == kept


def test_the_reserve_is_the_operators_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORKESTR_RESERVE_GIB", "0.5")
    assert _reserve_bytes(100 * GIB) == GIB // 2
    monkeypatch.setenv("ORKESTR_RESERVE_GIB", "500")
    assert _reserve_bytes(100 * GIB) == 90 * GIB
    for bad in ("much", "-1", "0", "nan", "inf"):
        monkeypatch.setenv("ORKESTR_RESERVE_GIB", bad)
        with pytest.raises(InvalidRequest, match="takes a number of GiB"):
            _reserve_bytes(GIB)


@pytest.mark.parametrize(
    ("free", "files", "level"),
    [
        (6 * GIB, 300_000, Level.NORMAL),
        (4 * GIB, 300_000, Level.LOW),
        (2 * GIB, 300_000, Level.CRITICAL),
        (6 * GIB, 150_000, Level.LOW),
        (6 * GIB, 50_000, Level.CRITICAL),
    ],
)
def test_blocks_and_inodes_count_alike(free: int, files: int, level: Level) -> None:
    assert replace(ROOM, free_bytes=free, free_files=files).level is level


def test_a_file_system_that_counts_no_inodes_has_enough_of_them() -> None:
    room = replace(ROOM, files=0, free_files=0, reserve_files=0)
    assert room.level is Level.NORMAL
    assert "inodes" not in str(replace(room, free_bytes=0).problem).partition(", less")[0]


def test_who_wants_some_of_it_is_told_what_is_left() -> None:
    ROOM.require(45 * GIB)
    with pytest.raises(HostFull):
        ROOM.require(46 * GIB)
    with pytest.raises(HostFull, match="has 1024 MiB and 3000000 inodes left"):
        replace(ROOM, free_bytes=GIB).require()
    with pytest.raises(HostUnavailable, match="mounted read-only"):
        replace(ROOM, read_only=True).require()


def test_ballast_is_of_the_size_of_the_file_system() -> None:
    assert ballast_bytes(ROOM) == 256 * MIB
    assert ballast_bytes(replace(ROOM, size_bytes=3 * GIB)) == 96 * MIB


def test_ballast_is_let_go_of_and_taken(tmp_path: Path) -> None:
    ballast = Ballast(tmp_path / "ballast")
    small = replace(ROOM, size_bytes=GIB, free_bytes=GIB, reserve_bytes=200 * MIB)
    ballast.balance(replace(small, free_bytes=300 * MIB))
    assert not ballast.is_allocated
    ballast.balance(small)
    assert ballast.path.stat().st_blocks * 512 >= 32 * MIB
    ballast.balance(replace(small, free_bytes=60 * MIB))
    assert ballast.is_allocated
    ballast.balance(replace(small, free_bytes=40 * MIB))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_was_there_before_has_grown_by_what_was_written_since() -> None:
    growth = Growth()
    growth.record({"a": 10 * MIB, "b": GIB})
    growth.record({"a": 30 * MIB, "b": GIB, "c": 5 * MIB})
    assert growth.recent() == {"a": 20 * MIB, "b": 0, "c": 5 * MIB}
    assert growth.largest(1) == ["a", "c"]
    assert growth.largest(8 * MIB) == ["a"]
    growth.reset()
    assert growth.largest(1) == []


def test_who_is_held_is_told_or_waits() -> None:
    async def run() -> None:
        gate = Gate()
        await gate.hold("told", "there is no room")
        with pytest.raises(Held, match="there is no room"):
            async with gate.entering("told"):
                pass
        await gate.hold("waits", None)

        async def enter() -> None:
            async with gate.entering("waits"):
                pass

        entering = asyncio.create_task(enter())
        await asyncio.sleep(0)
        assert not entering.done()
        await gate.forget("waits")
        await asyncio.wait_for(entering, 5)
        await gate.release("told")
        async with gate.entering("told"):
            pass

    asyncio.run(run())


@pytest.mark.parametrize("short", [False, True])
def test_a_disk_is_deleted_later_only_while_there_is_space(tmp_path: Path, short: bool) -> None:
    """Else the one whose sandbox was ended for space would still take it, and the next be ended."""
    later = tmp_path / "later"

    def delete(path: Path) -> None:
        path.rename(later)

    disks = Disks(StatePaths(tmp_path / "state").ensure(), Instance(3))
    disks.delete = delete
    disks.refusal = (lambda: HostFull("There is none.")) if short else None
    image = disks.paths.disks / "sbx_nobody.img"
    image.touch()
    disks.release("sbx_nobody")
    assert (image.exists(), later.exists()) == (False, not short)
    disks.release("sbx_nobody")
