"""Builds over containers that are directories: from a recipe to an image, and what starts none."""

from __future__ import annotations

import pytest

from hostruntime.build.plan import Host
from hostruntime.build.report import RefusedHost
from hostruntime.errors import HostFull, InvalidRequest, NotFound
from hostruntime.wire.builds import StartBuild
from tests.hostruntime.build_world import World
from tests.hostruntime.build_world import world as world
from tests.hostruntime.fake_containers import tree_of


async def test_a_recipe_becomes_an_image(world: World) -> None:
    events = await world.build("write etc/new one", "say hello", "write etc/conf changed")
    kinds = [event["kind"] for event in events]
    assert kinds == [
        "boot",
        *("step_started", "step_finished"),
        *("step_started", "output", "step_finished"),
        *("step_started", "step_finished"),
        "scrub",
        "capture",
        "contents",
        "published",
    ]
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    image = world.store.get("img_1")
    assert (image.tree / "etc/new").read_text() == "one"
    assert (image.tree / "etc/conf").read_text() == "changed"
    sh = world.store.get("debian-12").tree / "bin/sh"
    assert (image.tree / "bin/sh").stat().st_ino == sh.stat().st_ino
    published = events[-1]
    assert published["image"] == "img_1"
    assert published["file_count"] == image.manifest.file_count == 3
    assert published["shared_bytes"] == 4096
    assert image.manifest.base == "debian-12"
    assert (await world.builds.status("img_1")).state == "published"
    assert world.containers.kills == 3
    world.check_clean()


async def test_events_carry_the_fields_of_the_contract(world: World) -> None:
    events = {event["kind"]: event for event in await world.build("say hello")}
    assert events["boot"]["boot_ms"] == 12.3
    assert events["boot"]["duration_ms"] >= 0
    started = {key: events["step_started"][key] for key in ("step", "total", "command")}
    assert started == {"step": 1, "total": 1, "command": "say hello"}
    assert (events["output"]["step"], events["output"]["text"]) == (1, "hello\n")
    finished = events["step_finished"]
    keys = ("step", "exit_code", "signal", "duration_ms", "output_bytes", "elided_bytes")
    assert [finished[key] for key in keys] == [1, 0, None, 5, 6, 0]
    assert (finished["added_bytes"], finished["added_files"]) == (0, 0)
    assert set(events["scrub"]) >= {"removed_bytes", "removed", "duration_ms"}
    assert set(events["capture"]) >= {"size_bytes", "file_count", "shared_bytes", "duration_ms"}
    assert events["published"]["total_ms"] >= events["published"]["publish_ms"] >= 0


async def test_what_a_step_added_and_the_scrub_removed_is_told(world: World) -> None:
    events = await world.build("write etc/new 12345", "write tmp/x 1", "write var/log/a.log logged")
    added = [
        (event["added_bytes"], event["added_files"])
        for event in events
        if event["kind"] == "step_finished"
    ]
    assert added == [(5, 2), (1, 2), (6, 3)]
    scrubbed = next(event for event in events if event["kind"] == "scrub")
    assert scrubbed["removed"] == [{"what": "logs", "bytes": 4096, "files": 1}]
    assert scrubbed["removed_bytes"] == 4096


async def test_a_step_that_says_nothing_is_told_ever_more_rarely(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hostruntime.build.steps.SILENCE_SECONDS", 0.02)
    events = await world.build("sleep 0.5", "sleep 0.01")
    silent = [
        (event["step"], event["seconds"]) for event in events if event["kind"] == "step_silent"
    ]
    assert silent[:4] == [(1, 0.02), (1, 0.04), (1, 0.08), (1, 0.16)]


async def test_the_same_id_starts_once(world: World) -> None:
    request = StartBuild("img_1", "debian-12", ("sleep 0.1", "write etc/a x"), "restricted")
    assert (await world.builds.start(request))[1] is True
    status, new = await world.builds.start(request)
    assert (status.state, new) == ("running", False)
    await world.events()
    status, new = await world.builds.start(request)
    assert (status.state, new) == ("published", False)
    assert world.containers.ran == ["sleep 0.1", "write etc/a x"]


async def test_two_builds_run_at_once(world: World) -> None:
    for number in (1, 2, 3):
        await world.start("sleep 0.1", f"write etc/which {number}", build_id=f"img_{number}")
    for number in (1, 2, 3):
        assert (await world.events(f"img_{number}"))[-1]["kind"] == "published"
        which = world.store.get(f"img_{number}").tree / "etc/which"
        assert which.read_text() == str(number)


async def test_a_template_is_built_on_a_template(world: World) -> None:
    await world.build("write etc/first 1")
    events = await world.build("write etc/second 2", build_id="img_2", base_image="img_1")
    assert events[-1]["kind"] == "published"
    tree = world.store.get("img_2").tree
    assert (tree / "etc/first").read_text() + (tree / "etc/second").read_text() == "12"
    world.store.delete("img_1")
    world.store.trash.wait()
    assert (tree / "etc/first").read_text() == "1"


async def test_a_full_disk_takes_no_build_and_one_later(world: World) -> None:
    world.containers.disk_full = True
    with pytest.raises(HostFull):
        await world.build("say x")
    assert list(world.paths.builds.iterdir()) == []
    world.containers.disk_full = False
    assert (await world.build("say x"))[-1]["kind"] == "published"


async def test_a_host_without_a_free_slot_fails_the_build(world: World) -> None:
    world.containers.full = True
    failed = (await world.build("say x"))[-1]
    assert (failed["code"], failed["message"]) == (
        "no_room",
        "There is no free slot on this host; try again.",
    )
    world.check_clean()


async def test_a_defect_is_an_end_too(world: World) -> None:
    def defect(*_: object) -> list[RefusedHost]:
        raise ZeroDivisionError

    world.restart()
    world.builds._host = Host(
        world.store,
        world.containers.as_manager(),
        lambda _policy, _image: world.runtime,
        defect,
        world.builds._host.layers,
    )
    failed = (await world.build("fail 1"))[-1]
    assert failed["code"] == "internal"
    assert "defect" in failed["message"]
    world.check_clean()


@pytest.mark.parametrize("network", ["", "everything"])
async def test_an_unknown_network_starts_nothing(world: World, network: str) -> None:
    with pytest.raises(InvalidRequest):
        await world.start("say x", network=network)
    assert tree_of(world.paths.builds) == set()


@pytest.mark.parametrize("build_id", ["", "../x", "a/b", ".x"])
async def test_a_bad_id_starts_nothing(world: World, build_id: str) -> None:
    with pytest.raises(InvalidRequest):
        await world.start("say x", build_id=build_id)
    with pytest.raises(NotFound):
        await world.builds.status(build_id)
    assert tree_of(world.paths.builds) == set()


# Cancelling -------------------------------------------------------------------------------
