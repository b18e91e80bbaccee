"""The sums of what a sandbox uses: by day, once, bounded, and back after a restart."""

from __future__ import annotations

import time
from datetime import UTC, date, datetime
from pathlib import Path

import pytest

from hostruntime.container.cgroups import CgroupLayout, ContainerGroups
from hostruntime.host.days import split_by_day
from hostruntime.host.paths import StatePaths
from hostruntime.image.quarantine import Quarantine
from hostruntime.image.trash import Trash
from hostruntime.sandbox import usage
from hostruntime.sandbox.usage import Meter, Reading, UsageStore

MIDNIGHT = datetime(2026, 11, 24, tzinfo=UTC).timestamp()
GB = 10**9


class Machine:
    """A directory in the place of the cgroup v2 hierarchy, and a book on it."""

    def __init__(self, root: Path) -> None:
        self.layout = CgroupLayout("v2", root / "cgroup", {}, (root / "cgroup",))
        self.paths = StatePaths(root / "state").ensure()
        self.sums = self.paths.usage

    def groups(self, sandbox_id: str) -> ContainerGroups:
        return self.layout.container(f"ork0-{sandbox_id}")

    def counters(self, sandbox_id: str, cpu_us: int, memory_bytes: int) -> None:
        group = self.groups(sandbox_id).unified
        group.mkdir(parents=True, exist_ok=True)
        (group / "cpu.stat").write_text(f"usage_usec {cpu_us}\nuser_usec 1\nsystem_usec 2\n")
        (group / "memory.current").write_text(f"{memory_bytes}\n")

    def book(self) -> UsageStore:
        return UsageStore(self.sums, self.groups, Quarantine(self.paths, Trash(self.paths)))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def totals(meter: Meter) -> list[float]:
    parts = [meter.before, *meter.days.values()]
    return [sum(part[0] for part in parts), sum(part[1] for part in parts)]


def test_a_stretch_over_midnight_is_shared_by_its_days() -> None:
    assert list(split_by_day(MIDNIGHT - 30, MIDNIGHT + 10)) == [
        (date(2026, 11, 23), 0.75),
        (date(2026, 11, 24), 0.25),
    ]
    assert list(split_by_day(MIDNIGHT, MIDNIGHT)) == [(date(2026, 11, 24), 1.0)]
    assert [share for _, share in split_by_day(MIDNIGHT - 86400, MIDNIGHT + 2 * 86400)] == [
        1 / 3
    ] * 3


def test_memory_is_the_mean_of_two_readings_times_the_time() -> None:
    meter = Meter("a", read_at=100.0)
    meter.add(Reading(102.0, 500_000, 1 * GB), MIDNIGHT + 2)
    meter.add(Reading(104.0, 1_500_000, 3 * GB), MIDNIGHT + 4)
    assert meter.days == {"2026-11-24": [1.5, pytest.approx(2 + 4)]}


def test_a_reading_over_midnight_is_on_both_days() -> None:
    meter = Meter("a", read_at=100.0, memory_bytes=GB)
    meter.add(Reading(104.0, 2_000_000, GB), MIDNIGHT + 1)
    assert meter.days == {
        "2026-11-23": [pytest.approx(1.5), pytest.approx(3.0)],
        "2026-11-24": [pytest.approx(0.5), pytest.approx(1.0)],
    }


def test_an_old_reading_and_one_after_the_end_count_for_nothing() -> None:
    meter = Meter("a", read_at=100.0)
    meter.add(Reading(99.0, 9_000_000, GB), MIDNIGHT)
    meter.ended_at = MIDNIGHT
    meter.add(Reading(110.0, 9_000_000, GB), MIDNIGHT)
    assert totals(meter) == [0.0, 0.0]


def test_old_days_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "MAX_DAYS", 3)
    meter = Meter("a", read_at=0.0, memory_bytes=GB)
    for day in range(1, 11):
        meter.add(Reading(day * 10.0, day * 1_000_000, GB), MIDNIGHT + day * 86400)
    assert len(meter.days) == 3
    assert meter.before == [pytest.approx(7.0), pytest.approx(70.0)]
    assert totals(meter) == [pytest.approx(10.0), pytest.approx(100.0)]


async def test_what_ran_while_no_agent_was_there_is_made_up_for(machine: Machine) -> None:
    machine.counters("a", 1_000_000, GB)
    first = machine.book()
    first.start("a", time.time() - 100)
    first.read("a")
    await first.close()
    machine.counters("a", 5_000_000, GB)
    second = machine.book()
    second.recover({"a": time.time() - 100})
    second.read("a")
    [meter] = second.list()
    assert totals(meter) == [pytest.approx(5.0), pytest.approx(100.0, abs=5)]


async def test_one_that_ended_while_no_agent_was_there_keeps_its_sums(machine: Machine) -> None:
    machine.counters("a", 1_000_000, GB)
    first = machine.book()
    first.start("a", time.time() - 10)
    first.read("a")
    await first.close()
    second = machine.book()
    second.recover({})
    assert [meter.info().ended for meter in second.list()] == [True]
    assert totals(second.list()[0])[0] == pytest.approx(1.0)


async def test_one_that_was_never_written_down_is_counted_from_its_start(machine: Machine) -> None:
    machine.counters("a", 3_000_000, GB)
    book = machine.book()
    book.recover({"a": time.time() - 20})
    book.read("a")
    assert totals(book.list()[0]) == [pytest.approx(3.0), pytest.approx(20.0, abs=5)]


async def test_only_what_has_ended_can_be_collected(machine: Machine) -> None:
    machine.counters("a", 1, 1)
    book = machine.book()
    book.start("a", time.time())
    book.start("b", time.time())
    await book.finish("b")
    await book.forget_collected(["a", "b", "../a"])
    assert [meter.id for meter in book.list()] == ["a"]
    again = machine.book()
    again.recover({})
    assert again.list() == []


def test_a_file_that_is_no_record_is_dropped(machine: Machine) -> None:
    (machine.sums / "a.json").write_text('{"nonsense": 1}')
    (machine.sums / "b.json").write_text("{")
    book = machine.book()
    book.recover({})
    assert book.list() == []
    assert list(machine.sums.iterdir()) == []


async def test_what_nobody_collects_is_bounded(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "MAX_ENDED", 2)
    book = machine.book()
    for number in range(4):
        book.start(f"s{number}", time.time())
        await book.finish(f"s{number}")
    again = machine.book()
    again.recover({})
    assert sorted(meter.id for meter in again.list()) == ["s2", "s3"]
    monkeypatch.setattr(usage, "KEEP_ENDED_SECONDS", -1.0)
    last = machine.book()
    last.recover({})
    assert last.list() == []
