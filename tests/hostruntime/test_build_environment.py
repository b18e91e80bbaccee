"""The environment that a build bakes into an image, over containers that are directories."""

from __future__ import annotations

import pytest

from hostruntime.image.store import ImageStore
from tests.hostruntime.build_world import World
from tests.hostruntime.build_world import world as world


async def test_the_environment_is_baked_and_every_step_has_it(world: World) -> None:
    await world.build("say 1", env={"A": "1", "MODE": "$MODE-x"})
    await world.build(
        "say 2",
        "write etc/environment B=file\nA=file\nHTTP_PROXY=http://x\n",
        "say 3",
        build_id="img_2",
        base_image="img_1",
        env={"C": "own"},
    )
    await world.build("say 4", build_id="img_3", base_image="img_2", env={"B": "last"})
    first, second, _, third, fourth = world.containers.environments
    assert first == {"MODE": "restricted-x", "A": "1"}
    assert second == {"MODE": "restricted-x", "A": "1", "C": "own"}
    assert third == {**second, "A": "file", "B": "file"}
    assert fourth == {**third, "B": "last"}
    assert world.store.get("img_1").manifest.env == {"A": "1", "MODE": "$MODE-x"}
    again = ImageStore(world.paths).get("img_3")
    assert again.manifest.env == {"A": "file", "B": "last", "C": "own", "MODE": "$MODE-x"}


async def test_an_environment_that_has_become_too_large_is_said(world: World) -> None:
    for number in range(2):
        events = await world.build(
            "say x",
            build_id=f"img_{number + 1}",
            base_image="img_1" if number else "debian-12",
            env={f"A{number}": "x" * 70_000},
        )
    assert events[-1]["code"] == "environment_too_large"
    assert "140,004 bytes altogether, and may have 131,072" in events[-1]["message"]
    assert world.containers.ran == ["say x"]
    world.check_clean("img_2")


async def test_a_variable_that_has_become_too_large_is_said(world: World) -> None:
    """Each is less than the kernel takes, and so is what is baked in; what it stands on is not."""
    below = {"A": "1", "MODE": "x" * 65_000}
    await world.build("say x", env=below)
    grown = {"MODE": "é" * 33_100 + "$MODE"}
    events = await world.build("say y", build_id="img_2", base_image="img_1", env=grown)
    assert events[-1]["code"] == "environment_too_large"
    assert "environment variable MODE would have 131,206 bytes" in events[-1]["message"]
    assert world.containers.ran == ["say x"]
    world.check_clean("img_2")


@pytest.mark.parametrize("last", [False, True])
async def test_a_step_that_bakes_too_much_is_said(world: World, last: bool) -> None:
    lines = "".join(f"B{number}={'x' * 6_000}\n" for number in range(10))
    steps = [f"write etc/environment {lines}", *([] if last else ["say after"])]
    events = await world.build("say before", *steps, env={"A": "x" * 90_000})
    failed = events[-1]
    assert (failed["code"], failed["step"]) == ("environment_too_large", 2)
    assert failed["message"].startswith("Step 2 wrote too much to /etc/environment.")
    assert "say after" not in world.containers.ran
    world.check_clean()


async def test_what_is_baked_is_among_the_contents(world: World) -> None:
    await world.build("say 1", env={"A": "1"})
    events = await world.build(
        "write etc/environment B=2\n",
        build_id="img_2",
        base_image="img_1",
        env={"A": "$A:own"},
    )
    (told,) = [event for event in events if event["kind"] == "contents"]
    assert told["env"] == {"A": "1:own", "B": "2"} == world.store.get("img_2").manifest.env
