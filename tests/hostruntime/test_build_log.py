"""The event log: numbered without gaps, on disk first, followed from anywhere."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from hostruntime.build.log import EventLog


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.ndjson"


async def read(log: EventLog, after: int = 0, *, follow: bool = False) -> list[dict[str, Any]]:
    data = b"".join([lines async for lines in log.follow(after, follow=follow)])
    return [json.loads(line) for line in data.splitlines() if line]


async def test_events_are_numbered_from_one(path: Path) -> None:
    log = EventLog(path)
    log.append("boot", boot_ms=3)
    log.append("output", step=1, text="é\n")
    assert [(event["seq"], event["kind"]) for event in await read(log)] == [
        (1, "boot"),
        (2, "output"),
    ]
    assert (await read(log, 1))[0]["text"] == "é\n"
    assert await read(log, 2) == []
    assert await read(log, 99) == []


async def test_an_event_is_on_disk_before_a_follower_has_it(path: Path) -> None:
    log = EventLog(path)
    log.append("boot")
    seen: list[tuple[int, int]] = []

    async def watch() -> None:
        async for lines in log.follow(follow=True):
            seq = json.loads(lines.splitlines()[-1])["seq"]
            seen.append((seq, len(path.read_bytes().splitlines())))

    watching = asyncio.create_task(watch())
    for number in range(20):
        log.append("output", step=1, text=str(number))
        await asyncio.sleep(0)
    log.append("failed", code="step_failed", message="x")
    await watching
    assert seen[-1] == (22, 22)
    assert all(on_disk >= seq for seq, on_disk in seen)


async def test_followers_resume_where_they_were(path: Path) -> None:
    log = EventLog(path)
    for number in range(5):
        log.append("output", step=1, text=str(number))
    follower = asyncio.create_task(read(log, 3, follow=True))
    await asyncio.sleep(0)
    log.append("published", image="img_1")
    assert [event["seq"] for event in await follower] == [4, 5, 6]


async def test_a_large_log_comes_in_pieces_and_whole(path: Path) -> None:
    log = EventLog(path)
    for number in range(60):
        log.append("output", step=1, text=f"{number}" + "x" * 60_000)
    pieces = [lines async for lines in log.follow(follow=False)]
    assert len(pieces) > 1
    assert max(map(len, pieces)) < 2_000_000
    assert [event["seq"] for event in await read(log)] == list(range(1, 61))


async def test_silence_is_broken_by_empty_lines(path: Path) -> None:
    log = EventLog(path)
    lines = []
    async for line in log.follow(keep_alive=0.02):
        lines.append(line)
        if len(lines) == 3:
            break
    assert lines == [b"\n"] * 3


async def test_a_killed_agents_half_line_is_cut_off(path: Path) -> None:
    log = EventLog(path)
    log.append("boot")
    log.append("output", step=1, text="whole")
    await log.flush()
    with path.open("ab") as file:
        file.write(b'{"seq": 3, "kind": "outp')
    again = EventLog(path)
    assert (again.last_seq, again.terminal) == (2, None)
    again.append("failed", code="host_lost", message="x")
    await again.flush()
    assert [event["seq"] for event in await read(EventLog(path))] == [1, 2, 3]
    terminal = EventLog(path).terminal
    assert terminal is not None and terminal["code"] == "host_lost"


async def test_a_build_ends_once(path: Path) -> None:
    log = EventLog(path)
    log.append("failed", code="x", message="x")
    with pytest.raises(AssertionError):
        log.append("published", image="img_1")


async def test_what_could_not_be_written_is_written_later_whole_and_in_order(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, real = EventLog(path), os.write
    log.append("boot")
    await log.flush()

    def full(descriptor: int, data: bytes) -> int:
        real(descriptor, data[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    log.append("output", step=1, text="a")
    with pytest.raises(OSError, match="No space"):
        await log.flush()
    log.append("output", step=1, text="b")
    await asyncio.sleep(0.05)
    with pytest.raises(OSError, match="No space"):
        log.append("output", step=1, text="refused")
    assert log.last_seq == 1
    assert len(path.read_bytes().splitlines()) == 1
    monkeypatch.setattr(os, "write", real)
    await log.finish("failed", code="no_room", message="x")
    events = await read(EventLog(path))
    assert [event["seq"] for event in events] == [1, 2, 3, 4]
    assert [event.get("text") for event in events] == [None, "a", "b", None]


async def test_the_record_is_written_between_the_last_event_and_the_news_of_it(path: Path) -> None:
    log = EventLog(path)
    record = path.with_name("build.json")

    def save() -> None:
        assert json.loads(path.read_text().splitlines()[-1])["kind"] == "published"
        record.touch()

    following = asyncio.create_task(read(log, follow=True))
    log.append("boot")
    finishing = asyncio.create_task(log.finish("published", save, image="img_1"))
    assert [event["kind"] for event in await following] == ["boot", "published"]
    assert record.exists()
    await finishing
    assert log.terminal is not None


async def test_a_record_that_cannot_be_written_keeps_nobody_from_the_end(path: Path) -> None:
    log = EventLog(path)

    def save() -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with pytest.raises(OSError, match="Read-only"):
        await log.finish("published", save, image="img_1")
    assert [event["kind"] for event in await read(log, follow=True)] == ["published"]
