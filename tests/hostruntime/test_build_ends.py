"""Builds over containers that are directories: cancelled, killed, and what is left of them."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from hostruntime.build.manager import KEEP_SECONDS
from hostruntime.host.paths import read_json, write_json
from hostruntime.image.store import ImageManifest, ImageRevokedError
from tests.hostruntime.build_world import World
from tests.hostruntime.build_world import world as world
from tests.hostruntime.trees_help import grow


@pytest.mark.parametrize("delay", [0.0, 0.001, 0.02, 0.06, 0.1])
async def test_cancelling_at_any_time_leaves_nothing(world: World, delay: float) -> None:
    world.containers.start_seconds = 0.03
    await world.start("write etc/a x", "sleep 0.05", "write etc/b x")
    await asyncio.sleep(delay)
    await world.builds.cancel("img_1")
    assert (await world.builds.status("img_1")).state == "cancelled"
    assert not world.store.exists("img_1")
    world.check_clean()
    await world.builds.cancel("img_1")
    last = (await world.events())[-1]
    # The longest of the delays may let it be published first; then it is taken back.
    assert last["kind"] == "published" or last["code"] == "build_cancelled"


@pytest.mark.parametrize("phase", ["create_staging", "publish", "acquire"])
async def test_cancelling_in_the_middle_of_a_phase(
    world: World, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each phase is held until the cancellation has been asked for."""
    loop = asyncio.get_running_loop()
    real = getattr(world.store, phase)
    cancelling: list[asyncio.Task[None]] = []

    def ask() -> None:
        cancelling.append(loop.create_task(world.builds.cancel("img_1")))

    def held(*args: Any, **options: Any) -> Any:
        loop.call_soon_threadsafe(ask)
        time.sleep(0.1)
        return real(*args, **options)

    monkeypatch.setattr(world.store, phase, held)
    await world.start("write etc/a x")
    events = await world.events()
    await cancelling[0]
    assert events[-1]["code"] == "build_cancelled"
    assert (await world.builds.status("img_1")).state == "cancelled"
    assert not world.store.exists("img_1")
    world.check_clean()


async def test_a_cancellation_races_the_publishing_and_one_of_them_wins(world: World) -> None:
    """A hundred times, at any instant around it: never both, never neither."""
    spread = random.Random(6)
    outcomes: dict[str, int] = {"published": 0, "cancelled": 0}
    wait = 0.02
    for number in range(100):
        build_id = f"img_{number}"
        await world.start("write etc/a x", build_id=build_id)
        await asyncio.sleep(spread.uniform(0.7, 1.3) * wait)
        await world.builds.cancel(build_id, keep_published=True)
        state = (await world.builds.status(build_id)).state
        outcomes[state] += 1
        # So that it stays around the instant of publishing, whatever the machine's speed.
        wait *= 0.95 if state == "published" else 1.05
        assert world.store.exists(build_id) == (state == "published")
        last = (await world.events(build_id))[-1]
        assert last["kind"] == ("published" if state == "published" else "failed")
    assert min(outcomes.values()) > 0, outcomes
    for image in world.store.list():
        world.store.delete(image.id if image.manifest.kind == "template" else "")
    assert {image.id for image in world.store.list()} == {"debian-12"}
    world.check_clean("img_0")


@pytest.mark.parametrize("keep", [True, False])
async def test_what_is_being_published_when_the_cancellation_comes(
    world: World, monkeypatch: pytest.MonkeyPatch, *, keep: bool
) -> None:
    """Held right after the rename, under its lock: the cancellation has come too late."""
    publishing = threading.Event()
    real = world.store._publish_template

    def slow(staged: Path, image_id: str) -> Path:
        directory = real(staged, image_id)
        publishing.set()
        time.sleep(0.1)
        return directory

    monkeypatch.setattr(world.store, "_publish_template", slow)
    await world.start("write etc/a x")
    await asyncio.to_thread(publishing.wait, 5)
    await world.builds.cancel("img_1", keep_published=keep)
    assert (await world.events())[-1]["kind"] == "published"
    assert world.store.exists("img_1") == keep
    assert (await world.builds.status("img_1")).state == ("published" if keep else "cancelled")


async def test_whoever_was_ended_cannot_publish_however_late(world: World) -> None:
    staged = world.store.create_staging("img_1")
    grow(staged / "tree", {"etc/a": "late"})
    assert world.store.revoke("img_1")
    with pytest.raises(ImageRevokedError):
        world.store.publish(staged, ImageManifest("img_1", "template", None, 1.0, 1, 1, 0))
    assert not world.store.exists("img_1")
    world.store.clear_revocation("img_1")
    world.store.publish(staged, ImageManifest("img_1", "template", None, 1.0, 1, 1, 0))
    assert not world.store.revoke("img_1")


async def test_cancelling_does_not_wait_for_the_disk(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushing, go_on = threading.Event(), threading.Event()

    def flush() -> None:
        flushing.set()
        go_on.wait(20)

    monkeypatch.setattr(world.store, "flush", flush)
    await world.start("write etc/a x")
    await asyncio.to_thread(flushing.wait, 5)
    await world.builds.cancel("img_1")
    assert not go_on.is_set()
    world.check_clean()
    go_on.set()


async def test_cancelling_a_published_build_deletes_its_image(world: World) -> None:
    await world.build("write etc/a x")
    await world.builds.cancel("img_1")
    assert not world.store.exists("img_1")
    assert (await world.builds.status("img_1")).state == "cancelled"
    assert world.store.trash.wait()
    world.check_clean()


async def test_a_cancellation_that_comes_first_wins(world: World) -> None:
    await world.builds.cancel("img_1")
    await world.start("write etc/a x")
    assert (await world.builds.status("img_1")).state == "cancelled"
    assert world.containers.ran == []
    assert [event["code"] for event in await world.events()] == ["build_cancelled"]


async def test_cancelling_twice_at_once(world: World) -> None:
    await world.start("sleep 5")
    await asyncio.sleep(0.02)
    await asyncio.gather(world.builds.cancel("img_1"), world.builds.cancel("img_1"))
    world.check_clean()


# An agent that stops ----------------------------------------------------------------------


async def test_an_agent_that_stops_ends_its_builds(world: World) -> None:
    await world.start("sleep 5")
    await asyncio.sleep(0.02)
    await world.builds.close()
    status = await world.builds.status("img_1")
    assert status.state == "failed"
    assert status.error is not None and status.error["code"] == "host_lost"
    world.check_clean()


def killed(world: World, state: str = "running") -> Path:
    """A build as a killed agent leaves it."""
    directory = world.paths.builds / "img_1"
    grow(directory, {"rw/upper/etc/half": "half"})
    record = {"id": "img_1", "state": state, "created_at": time.time() - 5}
    write_json(directory / "build.json", {**record, "request": {"base_image": "debian-12"}})
    lines = [{"seq": 1, "at": 1.0, "kind": "boot"}, {"seq": 2, "at": 2.0, "kind": "output"}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / "events.ndjson").write_text(text + '{"seq": 3, "at"')
    world.store.acquire("debian-12", "img_1")
    grow(world.paths.staging / "img_1", {"tree/half": "half"})
    return directory


async def test_a_killed_agents_build_is_host_lost(world: World) -> None:
    killed(world)
    world.restart()
    await world.builds.recover()
    events = await world.events()
    assert [event["seq"] for event in events] == [1, 2, 3]
    assert (events[-1]["kind"], events[-1]["code"]) == ("failed", "host_lost")
    assert (await world.builds.status("img_1")).state == "failed"
    world.check_clean()


async def test_a_build_killed_after_publishing_was_published(world: World) -> None:
    await world.build("write etc/a x")
    world.store.trash.wait()
    record = read_json(world.paths.builds / "img_1/build.json") or {}
    write_json(world.paths.builds / "img_1/build.json", {**record, "state": "running"})
    events = (world.paths.builds / "img_1/events.ndjson").read_text().splitlines(keepends=True)
    (world.paths.builds / "img_1/events.ndjson").write_text("".join(events[:-1]))
    world.restart()
    await world.builds.recover()
    assert (await world.events())[-1]["kind"] == "published"
    assert (await world.builds.status("img_1")).state == "published"
    assert world.store.exists("img_1")


async def test_a_build_killed_after_its_last_event_keeps_it(world: World) -> None:
    await world.build("fail 1")
    record = read_json(world.paths.builds / "img_1/build.json") or {}
    write_json(
        world.paths.builds / "img_1/build.json", {**record, "state": "running", "error": None}
    )
    world.restart()
    await world.builds.recover()
    status = await world.builds.status("img_1")
    assert status.state == "failed"
    assert status.error is not None and status.error["code"] == "step_failed"
    assert len([e for e in await world.events() if e["kind"] == "failed"]) == 1


async def test_recovery_forgets_what_is_long_over(world: World) -> None:
    await world.build("fail 1")
    await world.build("fail 1", build_id="img_2")
    path = world.paths.builds / "img_1/build.json"
    record = read_json(path) or {}
    write_json(path, {**record, "finished_at": time.time() - KEEP_SECONDS - 1})
    grow(world.paths.builds / "img_no_record", {"rw/x": "x"})
    world.restart()
    await world.builds.recover()
    assert {entry.name for entry in world.paths.builds.iterdir()} == {"img_2"}
