"""The end of a build, over containers that are directories: capture, described, published."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from hostruntime.host.progress import Progress
from hostruntime.image.capture import capture
from hostruntime.image.digest import image_digest
from hostruntime.image.inode_record import InodeRecord
from hostruntime.image.scrub import scrub
from hostruntime.image.store import ImageStore
from hostruntime.image.trees import Check
from tests.hostruntime.build_world import World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.mark.parametrize("phase", ["capture", "scrub", "contents", "publish"])
async def test_how_far_the_image_is_is_told_while_it_takes_long(
    world: World, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    monkeypatch.setattr("hostruntime.host.progress.REPORT_SECONDS", 0.01)
    log = world.paths.builds / "img_1" / "events.ndjson"

    def told() -> bool:
        return f'"kind": "progress", "phase": "{phase}"' in log.read_text()

    def slow(real: Any) -> Any:
        def wait_to_be_told(*args: Any, **options: Any) -> Any:
            result = real(*args, **options)
            until = time.monotonic() + 20
            while not told() and time.monotonic() < until:
                time.sleep(0.005)
            return result

        return wait_to_be_told

    works = {"capture": capture, "scrub": scrub, "contents": image_digest}
    if phase == "publish":
        monkeypatch.setattr(ImageStore, "flush", slow(ImageStore.flush))
    else:
        work: Any = works[phase]
        monkeypatch.setattr(f"hostruntime.build.assembly.{work.__name__}", slow(work))
    events = await world.build("write etc/new 12345", "write etc/conf changed")
    said = [event for event in events if event["kind"] == "progress" and event["phase"] == phase]
    assert said
    assert events[-1]["kind"] == "published"
    expected = {
        # Two files of the base's, one of them replaced, and a new one; the mount's are directories.
        "capture": {"files": 3},
        "scrub": {"files": 3},
        "contents": {"files": 2, "bytes": 12},
        "publish": {"files": 3, "bytes": events[-1]["size_bytes"]},
    }[phase]
    assert said[-1].items() >= expected.items()
    world.check_clean()


async def test_a_build_that_is_cancelled_in_its_capture_ends_at_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two of very many files; what was copied so far goes."""
    reached = threading.Event()

    def endless(_base: Path, _upper: Path, _tree: Path, check: Check, _done: Progress) -> None:
        reached.set()
        until = time.monotonic() + 20
        while time.monotonic() < until:
            check()
            time.sleep(0.001)

    monkeypatch.setattr("hostruntime.build.assembly.capture", endless)
    await world.start("write etc/new 1")
    assert await asyncio.to_thread(reached.wait, 10)
    await world.builds.cancel("img_1")
    assert (await world.builds.status("img_1")).state == "cancelled"
    world.check_clean()


async def test_a_disk_that_is_full_in_the_capture_leaves_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> Any:
        capture(*args)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hostruntime.build.assembly.capture", full)
    failed = (await world.build("write etc/new 1"))[-1]
    assert (failed["kind"], failed["code"]) == ("failed", "no_room")
    world.check_clean()


async def test_what_a_template_holds_is_written_down(world: World) -> None:
    await world.build("write etc/new 12345")
    image = world.store.get("img_1")
    inode_record = InodeRecord.read(image.tree.parent)
    assert inode_record is not None
    shared = {path.lstat().st_ino for path in (image.tree / "etc/conf", image.tree / "bin/sh")}
    assert set(inode_record.inherited().numbers) == shared
    assert (image.tree / "etc/new").stat().st_ino in inode_record.own().numbers
    used = world.store.usage("img_1")
    assert (used.size_bytes, used.shared_bytes) == (image.manifest.size_bytes, 8192)
