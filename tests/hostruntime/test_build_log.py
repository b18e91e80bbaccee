"""The event log: numbered without gaps, on disk first, followed from anywhere."""

from __future__ import annotations

import asyncio
import json
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
    with path.open("ab") as file:
        file.write(b'{"seq": 3, "kind": "outp')
    again = EventLog(path)
    assert (again.last_seq, again.terminal) == (2, None)
    again.append("failed", code="host_lost", message="x")
    assert [event["seq"] for event in await read(EventLog(path))] == [1, 2, 3]
    terminal = EventLog(path).terminal
    assert terminal is not None and terminal["code"] == "host_lost"


async def test_a_build_ends_once(path: Path) -> None:
    log = EventLog(path)
    log.append("failed", code="x", message="x")
    with pytest.raises(AssertionError):
        log.append("published", image="img_1")
