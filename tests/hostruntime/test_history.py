"""What is kept of a sandbox's use over its life: how much, for how long, and at what cost."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from hostruntime.sandbox import history
from hostruntime.sandbox.history import MAX_POINTS, Gauges, Histories, thinned
from hostruntime.wire.sandboxes import MetricsPoint
from tests.hostruntime.test_usage import Machine
from tests.hostruntime.test_usage import machine as machine

NOW = 1_800_000_000.0
MB = 1_000_000


def use(histories: Histories, sandbox_id: str, at: float, seconds: float = 30.0) -> None:
    """What a sampler adds in ``seconds``: half a CPU, and a megabyte."""
    for number in range(round(seconds / 2)):
        histories.add(sandbox_id, at - seconds + 2 * number + 2, 2.0, 1.0, MB)


def taken(histories: Histories, sandbox_id: str, at: float, seconds: float = 30.0) -> None:
    use(histories, sandbox_id, at, seconds)
    histories.write(histories.take_due())


def points(count: int, seconds: float = 30.0, gap: float = 0.0) -> list[MetricsPoint]:
    return [
        MetricsPoint(NOW - number * (seconds + gap), seconds, 1.0, MB, MB, 1, 2)
        for number in reversed(range(count))
    ]


def test_a_point_has_what_was_used_in_its_time(tmp_path: Path) -> None:
    sent = iter([(100, 200), (150, 260)])
    histories = Histories(tmp_path, lambda _: Gauges(5 * MB, next(sent)))
    histories.start("a")
    use(histories, "a", NOW, 20)
    assert histories.take_due() == []
    taken(histories, "a", NOW + 10, 10)
    taken(histories, "a", NOW + 40)
    assert histories.read("a") == [
        MetricsPoint(NOW + 10, 30.0, 15.0, MB, 5 * MB, 100, 200),
        MetricsPoint(NOW + 40, 30.0, 15.0, MB, 5 * MB, 50, 60),
    ]
    assert [one.at for one in histories.read("a", NOW + 10)] == [NOW + 40]
    assert histories.read("b") == []


def test_a_new_agent_goes_on_where_the_killed_one_stopped(tmp_path: Path) -> None:
    traffic = Gauges(None, (1000, 1000))
    killed = Histories(tmp_path, lambda _: traffic)
    killed.start("a")
    taken(killed, "a", NOW)
    # It was cut off in a write; and after a power failure there may be zeros.
    with (tmp_path / "a.points").open("ab") as file:
        file.write(bytes(7))
    histories = Histories(tmp_path, lambda _: traffic)
    histories.recover(["a", "b"])
    taken(histories, "a", NOW + 100)
    first, second = histories.read("a")
    assert (first.sent_bytes, second.at) == (1000, NOW + 100)
    # Nobody knows what it sent since the first agent's last point; of the next all is known.
    assert second.sent_bytes is None
    taken(histories, "a", NOW + 130)
    assert histories.read("a")[-1].sent_bytes == 0
    # It has a file, so its end is told there although it ran shortly under this agent.
    assert histories.end("a") is not None
    assert histories.end("b") is None


def test_a_pause_has_no_points_and_ends_one(tmp_path: Path) -> None:
    histories = Histories(tmp_path, lambda _: Gauges())
    use(histories, "a", NOW, 12)
    histories.cut("a")
    histories.cut("a")
    histories.write(histories.take_due())
    taken(histories, "a", NOW + 3600)
    assert [(one.at, one.seconds) for one in histories.read("a")] == [
        (NOW, 12.0),
        (NOW + 3600, 30.0),
    ]


def test_who_lives_shortly_leaves_no_file_and_others_their_last_seconds(tmp_path: Path) -> None:
    histories = Histories(tmp_path, lambda _: Gauges())
    use(histories, "short", NOW, 8)
    assert histories.end("short") is None
    use(histories, "long", NOW, 14)
    last = histories.end("long")
    assert last is not None
    histories.close_file(last)
    assert [one.seconds for one in histories.read("long")] == [14.0]
    assert [path.name for path in tmp_path.iterdir()] == ["long.points"]


@pytest.mark.parametrize("count", [MAX_POINTS, 7 * 24 * 120])
def test_thinning_keeps_the_sums_and_what_is_recent_exact(count: int) -> None:
    whole = points(count)
    kept = thinned(whole, NOW)
    assert len(kept) <= MAX_POINTS * 3 // 4
    assert sum(one.seconds for one in kept) == sum(one.seconds for one in whole)
    assert sum(one.cpu_seconds for one in kept) == count
    assert sum(one.received_bytes or 0 for one in kept) == 2 * count
    assert {one.memory_bytes for one in kept} == {MB}
    assert [one.seconds for one in kept[-40:]] == [30.0] * 40
    assert all(one.seconds <= max(30.0, (NOW - one.at) / 12) for one in kept)


def test_who_pauses_all_the_time_fills_no_disk(tmp_path: Path) -> None:
    """Each pause ends a point, and has time without figures on both sides."""
    assert len(thinned(points(5000, seconds=2.0, gap=8.0), NOW)) <= MAX_POINTS * 3 // 4
    histories = Histories(tmp_path, lambda _: Gauges())
    for number in range(2 * MAX_POINTS):
        use(histories, "a", NOW + 10 * number, 2)
        histories.cut("a")
        histories.write(histories.take_due())
    file = tmp_path / "a.points"
    assert file.stat().st_size <= (MAX_POINTS + 1) * history._POINT.size
    assert sum(one.seconds for one in histories.read("a")) == 2 * 2 * MAX_POINTS


def test_files_go_a_day_after_the_end_or_when_there_are_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    histories = Histories(tmp_path, lambda _: Gauges())
    for name, age in (("old", 90_000), ("running", 90_000), ("new", 80_000), ("newer", 70_000)):
        taken(histories, name, NOW)
        at = time.time() - age
        os.utime(tmp_path / f"{name}.points", (at, at))
    histories.sweep({"running"})
    assert {path.stem for path in tmp_path.iterdir()} == {"running", "new", "newer"}
    monkeypatch.setattr(history, "MAX_FILES", 1)
    histories.sweep({"running"})
    assert {path.stem for path in tmp_path.iterdir()} == {"running", "newer"}
    # It was paused for long: the day begins with its end.
    last = histories.end("running")
    assert last is not None
    histories.close_file(last)
    histories.sweep(set())
    assert {path.stem for path in tmp_path.iterdir()} == {"running"}


async def test_a_round_opens_a_bounded_number_of_files(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two for each sandbox, and one for its point, which a tenth of them get at a time."""
    count = 300
    store = machine.book()
    opened: list[str] = []
    written: list[Any] = []
    for number in range(count):
        machine.counters(f"s{number}", 1000, MB)
        store.start(f"s{number}", time.time())
    # Nothing is old enough to be saved, and the first round looks for files to delete.
    await store._sample()
    for number in range(count):
        use(store.history, f"s{number}", time.time(), 60)
    real_open, real_seek = os.open, os.lseek

    def counting(path: Any, *args: Any, **kwargs: Any) -> int:
        opened.append(str(path))
        return real_open(path, *args, **kwargs)

    def seeking(*args: int) -> int:
        written.append(args)
        return real_seek(*args)

    monkeypatch.setattr(os, "open", counting)
    monkeypatch.setattr(os, "lseek", seeking)
    await store._sample()
    monkeypatch.undo()
    kinds = [Path(path).suffix or Path(path).name for path in opened]
    assert kinds.count(".stat") == kinds.count(".current") == count
    assert kinds.count(".points") == len(written) == count // 10
    assert len(opened) == 2 * count + count // 10


async def test_a_paused_sandbox_has_no_points(machine: Machine) -> None:
    paused: set[str] = set()
    store = machine.book()
    store.is_paused = paused.__contains__
    machine.counters("a", 1000, MB)
    store.start("a", time.time())
    use(store.history, "a", time.time(), 12)
    paused.add("a")
    await store._sample()
    [point] = (await store.points("a", 0.0)).points
    assert point.seconds == pytest.approx(12, abs=1)
    await store._sample()
    await store.finish("a")
    assert (await store.points("a", 0.0)).points == (point,)


def test_one_that_ends_while_it_is_paused_leaves_nothing_in_memory(tmp_path: Path) -> None:
    histories = Histories(tmp_path, lambda _: Gauges(None, (1, 1)))
    for seconds, name in ((12, "a"), (4, "b")):
        histories.start(name)
        use(histories, name, NOW, seconds)
        histories.cut(name)
    last = histories.end("a")
    assert last is not None
    histories.close_file(last)
    # As short as one that is not paused.
    assert histories.end("b") is None
    histories.write(histories.take_due())
    assert [(one.at, one.seconds) for one in histories.read("a")] == [(NOW, 12.0)]
    assert [path.name for path in tmp_path.iterdir()] == ["a.points"]
    assert not histories._stored
    assert not histories._traffic


def test_one_that_ends_while_its_point_is_written_leaves_nothing_in_memory(tmp_path: Path) -> None:
    def gauges(sandbox_id: str) -> Gauges:
        histories.end(sandbox_id)
        return Gauges(None, (1, 1))

    histories = Histories(tmp_path, gauges)
    histories.start("a")
    taken(histories, "a", NOW)
    assert not histories._traffic
    assert not histories._stored
