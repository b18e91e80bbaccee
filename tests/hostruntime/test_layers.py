"""Layers: keys, what is believed, what is collected; and builds that begin with one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hostruntime.build import layers as layers_module
from hostruntime.build.layers import (
    DEFAULT_BUDGET_BYTES,
    KEEP_SECONDS,
    CompletedStep,
    LayerStore,
    budget_bytes,
    layer_keys,
)
from hostruntime.build.report import RefusedHost
from hostruntime.container.manager import ContainerSpec, RunningContainer
from hostruntime.errors import InvalidRequest
from hostruntime.host.paths import StatePaths, read_json, write_json
from hostruntime.image.trash import Trash
from hostruntime.wire.builds import Cache
from tests.hostruntime.build_world import World
from tests.hostruntime.fake_containers import tree_of

MIB = 1 << 20
KEYS = ["a" * 64, "b" * 64, "c" * 64]
BASE = {"image": "debian-12@1", "digest": "sha256:0", "runtime": "restricted-1"}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


class Shelf:
    """A store of layers, and one of them at a time made by hand."""

    def __init__(self, root: Path, budget: int = 1 << 40) -> None:
        self.paths = StatePaths(root / "state").ensure()
        self.trash = Trash(self.paths)
        self.budget = budget
        self.restart()

    def restart(self) -> None:
        self.store = LayerStore(self.paths, self.trash, self.budget)

    def put(self, scope: str, key: str, steps: int = 1, size: int = 10, age: float = 0.0) -> Path:
        directory = self.store.create_staging("img_1")
        (directory / "disk.ext4").write_bytes(os.urandom(size))
        self.store.add(directory, scope, key, [CompletedStep("img_1", 1.0)] * steps)
        target = self.paths.layers / scope / key
        used_at = time.time() - age
        if target.exists():
            os.utime(target / "layer.json", (used_at, used_at))
        return target

    def kept(self) -> set[str]:
        assert self.trash.wait()
        return {f"{path.parent.name}/{path.name[0]}" for path in self.paths.layers.glob("*/*")}


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


# Keys -----------------------------------------------------------------------------------------


def keys(*commands: str, **changes: Any) -> list[str]:
    fields: dict[str, Any] = {
        "base": BASE,
        "environment": {"PATH": "/bin"},
        "network": {"mode": "restricted", "allow_domains": None},
        "disk_mb": 64,
    }
    return layer_keys(commands=[["sh", "-c", one] for one in commands], **(fields | changes))


def test_a_key_depends_on_every_step_before_it() -> None:
    assert keys("a", "b", "c")[:2] == keys("a", "b")
    assert keys("a", "b")[0] == keys("a", "x")[0]
    assert keys("a", "b")[1] not in keys("x", "b") + keys("a", "x") + keys("b", "a") + keys("b")
    assert all(len(key) == 64 for key in keys("a", "b"))


@pytest.mark.parametrize(
    "changes",
    [
        {"base": BASE | {"image": "debian-12@2"}},
        {"base": BASE | {"digest": "sha256:1"}},
        {"base": BASE | {"runtime": "restricted-2"}},
        {"environment": {"PATH": "/sbin"}},
        {"network": {"mode": "open", "allow_domains": None}},
        {"network": {"mode": "restricted", "allow_domains": []}},
        {"disk_mb": 65},
    ],
)
def test_a_key_depends_on_all_that_a_step_sees(changes: dict[str, Any]) -> None:
    assert not set(keys("a", "b")) & set(keys("a", "b", **changes))


# What is believed -----------------------------------------------------------------------------


def test_the_deepest_layer_is_found(shelf: Shelf) -> None:
    assert shelf.store.deepest("team_1", KEYS) is None
    shelf.put("team_1", KEYS[0], 1)
    deep = shelf.put("team_1", KEYS[1], 2)
    found = shelf.store.deepest("team_1", KEYS)
    assert found is not None
    assert (found.directory, len(found.steps), found.tmpfs) == (deep, 2, None)
    assert shelf.store.deepest("team_2", KEYS) is None
    assert shelf.store.deepest("team_1", KEYS[:1]) is not None
    assert shelf.store.deepest("team_1", KEYS[2:]) is None


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no record": lambda layer: (layer / "layer.json").unlink(),
    "half a record": lambda layer: (layer / "layer.json").write_text('{"boot": "'),
    "another record": lambda layer: (layer / "layer.json").write_text('{"boot": [], "sizes": 1}'),
    "no disk": lambda layer: (layer / "disk.ext4").unlink(),
    "a short disk": lambda layer: os.truncate(layer / "disk.ext4", 5),
    "another boot": lambda layer: write_json(
        layer / "layer.json", (read_json(layer / "layer.json") or {}) | {"boot": "earlier"}
    ),
    "no steps": lambda layer: write_json(
        layer / "layer.json", (read_json(layer / "layer.json") or {}) | {"steps": []}
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_layer_is_as_none(shelf: Shelf, what: str) -> None:
    shelf.put("team_1", KEYS[0], 1)
    DAMAGE[what](shelf.put("team_1", KEYS[1], 2))
    found = shelf.store.deepest("team_1", KEYS)
    assert found is not None and len(found.steps) == 1
    shelf.store.recover()
    assert shelf.kept() == {"team_1/a"}


def test_a_layer_replaces_that_of_the_same_key(shelf: Shelf) -> None:
    shelf.put("team_1", KEYS[0], size=10)
    shelf.put("team_1", KEYS[0], size=20)
    found = shelf.store.deepest("team_1", KEYS)
    assert found is not None and found.disk.stat().st_size == 20


def test_what_was_found_knows_whether_it_is_still_there(shelf: Shelf) -> None:
    shelf.put("team_1", KEYS[0])
    found = shelf.store.deepest("team_1", KEYS)
    assert found is not None and found.still_exists()
    shelf.put("team_1", KEYS[0])
    assert not found.still_exists()
    found = shelf.store.deepest("team_1", KEYS)
    assert found is not None
    shelf.store.discard(found.directory)
    assert not found.still_exists()


def test_what_a_killed_agent_was_writing_goes(shelf: Shelf) -> None:
    half = shelf.store.create_staging("img_1")
    (half / "disk.ext4").write_text("half")
    shelf.put("team_1", KEYS[0])
    shelf.restart()
    shelf.store.recover()
    assert not half.exists()
    assert shelf.kept() == {"team_1/a"}


@pytest.mark.parametrize("scope", ["", "..", "a/b", ".x", "x" * 101])
def test_a_scope_is_a_plain_name(shelf: Shelf, scope: str) -> None:
    with pytest.raises(InvalidRequest):
        shelf.store.deepest(scope, KEYS)


# What is collected ----------------------------------------------------------------------------


def test_what_was_not_used_for_a_week_goes(shelf: Shelf) -> None:
    shelf.put("team_1", KEYS[0], age=KEEP_SECONDS + 60)
    shelf.put("team_2", KEYS[1], age=KEEP_SECONDS - 60)
    old = shelf.put("team_3", KEYS[2], age=KEEP_SECONDS + 60)
    assert old.exists() and shelf.store.deepest("team_3", [KEYS[2]])
    shelf.store.collect()
    assert shelf.kept() == {"team_2/b", "team_3/c"}
    assert {path.name for path in shelf.paths.layers.iterdir()} == {"team_2", "team_3"}


def test_over_the_budget_the_longest_unused_go_first(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, budget=5 * MIB)
    for number, key in enumerate(KEYS):
        shelf.put("team_1", key, size=2 * MIB, age=100.0 - number)
    shelf.store.collect()
    assert shelf.kept() == {"team_1/b", "team_1/c"}
    shelf.put("team_2", KEYS[0], size=4 * MIB)
    assert shelf.kept() == {"team_2/a"}


def test_on_a_short_disk_there_are_none(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf.put("team_1", KEYS[0])
    assert shelf.store.has_room(MIB)
    monkeypatch.setattr(layers_module, "MIN_FREE_SHARES", 1e9)
    assert not shelf.store.has_room(0)
    shelf.store.collect()
    assert shelf.kept() == set()


def test_the_budget_is_the_operators_to_set(tmp_path: Path) -> None:
    paths = StatePaths(tmp_path).ensure()
    assert 0 < budget_bytes(paths, {}) <= DEFAULT_BUDGET_BYTES
    assert budget_bytes(paths, {"ORKESTR_LAYERS_GIB": "1.5"}) == 1536 * MIB
    assert budget_bytes(paths, {"ORKESTR_LAYERS_GIB": "0"}) == 0
    for bad in ("much", "-1", "nan", "inf"):
        with pytest.raises(InvalidRequest, match="ORKESTR_LAYERS_GIB"):
            budget_bytes(paths, {"ORKESTR_LAYERS_GIB": bad})


# Builds ---------------------------------------------------------------------------------------

FIRST = ("write etc/a 1", "write etc/b 2", "fail 1")


async def build(world: World, name: str, *recipe: str, **options: Any) -> list[dict[str, Any]]:
    options = {"cache": Cache("team_1", reuse=True)} | options
    world.containers.ran.clear()
    return await world.build(*recipe, build_id=name, **options)


def cached(events: list[dict[str, Any]]) -> list[int]:
    return [event["step"] for event in events if event["kind"] == "step_cached"]


async def test_a_failed_builds_steps_are_not_run_again(world: World) -> None:
    await build(world, "img_1", *FIRST)
    events = await build(world, "img_2", *FIRST[:2], "write etc/c 3")
    assert world.containers.ran == ["write etc/c 3"]
    assert [event["kind"] for event in events][:4] == [
        "boot",
        "step_cached",
        "step_cached",
        "step_started",
    ]
    first = next(event for event in events if event["kind"] == "step_cached")
    assert (first["step"], first["total"], first["command"]) == (1, 3, FIRST[0])
    assert (first["build"], 0 <= time.time() - first["saved_at"] < 60) == ("img_1", True)
    tree = world.store.get("img_2").tree
    assert [(tree / f"etc/{name}").read_text() for name in "abc"] == ["1", "2", "3"]
    world.check_clean("img_2")


async def test_what_a_step_was_refused_is_still_told_when_it_is_not_run(world: World) -> None:
    world.refused = [RefusedHost("example.org", 443, "not_listed")]
    await build(world, "img_1", *FIRST)
    world.refused = []
    events = await build(world, "img_2", *FIRST[:2], "write etc/c 3")
    told = {
        event["step"]: [one["host"] for one in event["refused"]]
        for event in events
        if event["kind"] in {"step_cached", "step_finished"}
    }
    assert told == {1: ["example.org"], 2: ["example.org"], 3: []}


async def test_who_ran_a_step_is_still_known_in_the_next_generation(world: World) -> None:
    await build(world, "img_1", *FIRST)
    await build(world, "img_2", *FIRST[:2], "write etc/c 3", "fail 1")
    events = await build(world, "img_3", *FIRST[:2], "write etc/c 3", "write etc/d 4")
    assert [event["build"] for event in events if event["kind"] == "step_cached"] == [
        "img_1",
        "img_1",
        "img_2",
    ]


async def test_all_of_a_recipe_may_have_been_run(world: World) -> None:
    await build(world, "img_1", *FIRST)
    events = await build(world, "img_2", *FIRST[:2])
    assert (cached(events), world.containers.ran) == ([1, 2], [])
    assert events[-1]["kind"] == "published"


@pytest.mark.parametrize(
    ("recipe", "options", "expected"),
    [
        (FIRST, {}, [1, 2]),
        ((FIRST[0], "write etc/x 2", *FIRST[1:]), {}, [1]),
        (("write etc/x 1", *FIRST[1:]), {}, []),
        (FIRST, {"network": "open"}, []),
        (FIRST, {"allow_domains": ("example.org",)}, []),
        (FIRST, {"disk_mb": 512}, []),
        (FIRST, {"env": {"A": "1"}}, []),
        (FIRST, {"base_image": "img_base"}, []),
        (FIRST, {"cache": Cache("team_2", reuse=True)}, []),
        (FIRST, {"cache": Cache("team_1", reuse=False)}, []),
        (FIRST, {"cache": None}, []),
        (FIRST, {"memory_mb": 8192, "disk_mb": 20_480, "cpu": 1.0}, [1, 2]),
    ],
)
async def test_nothing_is_reused_where_anything_differs(
    world: World, recipe: tuple[str, ...], options: dict[str, Any], expected: list[int]
) -> None:
    await build(world, "img_base", "write etc/base x")
    await build(world, "img_1", *FIRST)
    events = await build(world, "img_2", *recipe, **options)
    assert cached(events) == expected
    assert world.containers.ran == list(recipe[len(expected) :])


async def test_a_published_build_leaves_no_layer(world: World) -> None:
    await build(world, "img_1", *FIRST)
    left = tree_of(world.paths.layers)
    await build(world, "img_2", *FIRST[:2], "write etc/c 3", "write etc/d 4")
    assert world.store.trash.wait()
    assert tree_of(world.paths.layers) == left
    await build(world, "img_3", "write etc/x 1", "write etc/y 2")
    assert world.store.trash.wait()
    assert tree_of(world.paths.layers) == left


async def test_a_layer_that_cannot_be_used_is_dropped_and_the_steps_run(world: World) -> None:
    await build(world, "img_1", *FIRST)
    for disk in world.paths.layers.glob("*/*/disk.ext4"):
        disk.write_bytes(b"x" * disk.stat().st_size)
    events = await build(world, "img_2", *FIRST[:2])
    assert (cached(events), events[-1]["kind"]) == ([], "published")
    assert world.containers.ran == list(FIRST[:2])
    world.check_clean("img_2")


async def test_a_layer_that_is_replaced_while_it_is_used_is_not_used(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await build(world, "img_1", *FIRST)
    real = world.containers.start

    async def start(spec: ContainerSpec) -> RunningContainer:
        running = await real(spec)
        if spec.saved_disk is not None:
            world.builds._host.layers.discard(world.paths.layers / "team_1")
        return running

    monkeypatch.setattr(world.containers, "start", start)
    events = await build(world, "img_2", *FIRST[:2])
    assert (cached(events), events[-1]["kind"]) == ([], "published")
    assert world.containers.ran == list(FIRST[:2])


async def test_a_layer_that_cannot_be_written_is_no_failure(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(world.containers, "save_disk", refuse)
    events = await build(world, "img_1", *FIRST[:2])
    assert events[-1]["kind"] == "published"
    assert tree_of(world.paths.layers) == set()


async def test_layers_are_written_only_where_they_are_cheap(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world.containers, "disk_allocated", lambda _: 100_000_000)
    await build(world, "img_1", *FIRST)
    assert tree_of(world.paths.layers) == set()
    monkeypatch.setattr(world.containers, "disk_allocated", lambda _: 50_000_000)
    await build(world, "img_2", *FIRST)
    assert len(list(world.paths.layers.glob("*/*"))) == 2


async def test_a_bad_scope_starts_nothing(world: World) -> None:
    with pytest.raises(InvalidRequest):
        await world.start("say x", cache=Cache("../x"))
    assert tree_of(world.paths.builds) == set()
