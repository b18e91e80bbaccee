"""Waiting for files to change: everybody is told, and nothing is watched for nobody."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from hostruntime.host.watching import FileWatch


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_text("")
    return path


async def told(event: asyncio.Event) -> bool:
    """Whether there is news, soon."""
    try:
        async with asyncio.timeout(5):
            await event.wait()
    except TimeoutError:
        return False
    event.clear()
    return True


async def quiet(event: asyncio.Event) -> bool:
    await asyncio.sleep(0.05)
    return not event.is_set()


async def test_all_who_wait_are_told_of_a_change_and_of_the_end_of_its_writer(file: Path) -> None:
    watch, writer = FileWatch(), os.open(file, os.O_WRONLY)
    async with watch.changes([file]) as one, watch.changes([file]) as other:
        # It may have changed before.
        assert await told(one) and await told(other)
        assert await quiet(one)
        os.write(writer, b"x")
        assert await told(one) and await told(other)
        os.close(writer)
        assert await told(one) and await told(other)
        assert watch.watched == 1
    assert watch.watched == 0
    watch.close()


async def test_who_leaves_takes_nothing_from_who_stays(file: Path, tmp_path: Path) -> None:
    watch, second = FileWatch(), tmp_path / "second"
    second.write_text("")
    async with watch.changes([second]) as other:
        await told(other)
        async with watch.changes([file, second]) as one:
            await told(one)
        file.write_text("x")
        assert await quiet(other)
        second.write_text("x")
        assert await told(other)
    watch.close()


async def test_a_file_that_is_deleted_is_told_of_and_watched_no_more(file: Path) -> None:
    watch = FileWatch()
    async with watch.changes([file]) as event:
        await told(event)
        file.unlink()
        assert await told(event)
        await asyncio.sleep(0.05)
        assert watch.watched == 0
    watch.close()


async def test_a_file_that_is_not_there_is_an_error_and_leaves_nothing(file: Path) -> None:
    watch = FileWatch()
    with pytest.raises(FileNotFoundError):
        async with watch.changes([file, file.with_name("none")]):
            pass
    assert watch.watched == 0
    watch.close()


async def test_those_who_come_and_go_at_once_miss_nothing(file: Path) -> None:
    """All watches of a file are one to the kernel: it must not go with who leaves meanwhile."""
    watch = FileWatch()

    async def come_and_go() -> None:
        for _ in range(50):
            async with watch.changes([file]) as event:
                event.clear()
                file.write_text("x")
                assert await told(event)

    await asyncio.gather(*(come_and_go() for _ in range(8)))
    assert watch.watched == 0
    watch.close()
