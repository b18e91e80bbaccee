"""Builds over containers that are directories: every way to end, and what is left of it."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from hostruntime.build_plan import Host
from hostruntime.build_report import Refused, step_failed
from hostruntime.builds import KEEP_SECONDS, BuildManager, BuildRequest
from hostruntime.errors import HostFull, InvalidRequest, NotFound
from hostruntime.exec import Exited
from hostruntime.images import ImageManifest, ImageRevokedError, ImageStore
from hostruntime.layers import LayerStore
from hostruntime.paths import StatePaths, read_json, write_json
from hostruntime.trees import tree_digest
from tests.hostruntime.fake_containers import FakeContainers, tree_of
from tests.hostruntime.trees_help import grow


class World:
    """A host whose containers are fake, with one base image."""

    def __init__(self, root: Path) -> None:
        self.paths = StatePaths(root / "state").ensure()
        self.runtime = grow(root / "runtime", {"etc/resolv.conf": "lent"})
        self.refused: list[Refused] = []
        self.unreached: list[str] = []
        self.containers = FakeContainers()
        self.restart()
        staged = self.store.staging("debian-12")
        grow(staged / "tree", {"etc/conf": "base", "bin/sh": "shell"})
        self.store.publish(staged, ImageManifest("debian-12", "base", None, 1.0, 1, 1, 0))
        self.before = tree_digest(self.store.get("debian-12").tree)

    def restart(self) -> None:
        """As after an agent was killed: nothing in memory survives."""
        self.store = ImageStore(self.paths)
        host = Host(
            self.store,
            self.containers.as_manager(),
            lambda _policy, _image: self.runtime,
            lambda _owner, _since: self.refused,
            LayerStore(self.paths, self.store.trash, 1 << 40),
            lambda _owner, _since: self.unreached,
        )
        self.builds = BuildManager(self.paths, host)

    def start(self, *recipe: str, build_id: str = "img_1", **changes: Any) -> None:
        fields = {"base_image": "debian-12", "network": "restricted", **changes}
        self.builds.start(BuildRequest(id=build_id, recipe=recipe, **fields))

    async def events(self, build_id: str = "img_1", *, follow: bool = True) -> list[dict[str, Any]]:
        data = b"".join([lines async for lines in self.builds.events(build_id, follow=follow)])
        return [json.loads(line) for line in data.splitlines() if line]

    async def build(self, *recipe: str, **changes: Any) -> list[dict[str, Any]]:
        self.start(*recipe, **changes)
        return await self.events(changes.get("build_id", "img_1"))

    def check_clean(self, build_id: str = "img_1") -> None:
        """Nothing is left of a build but its record and what it published."""
        assert tree_of(self.paths.builds / build_id) == {"build.json", "events.ndjson"}
        assert tree_of(self.paths.staging) == set()
        assert self.containers.specs == {}
        assert self.store.users("debian-12") == set()
        assert self.store.trash.wait()
        assert tree_of(self.paths.trash) == set()
        assert tree_digest(self.store.get("debian-12").tree) == self.before


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


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
    assert world.builds.status("img_1").state == "published"
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
    monkeypatch.setattr("hostruntime.steps.SILENCE_SECONDS", 0.02)
    events = await world.build("sleep 0.5", "sleep 0.01")
    silent = [
        (event["step"], event["seconds"]) for event in events if event["kind"] == "step_silent"
    ]
    assert silent[:4] == [(1, 0.02), (1, 0.04), (1, 0.08), (1, 0.16)]


async def test_a_failing_step_stops_the_build(world: World) -> None:
    events = await world.build("write etc/a x", "fail 3", "write etc/never x")
    failed = events[-1]
    assert (failed["kind"], failed["code"], failed["step"]) == ("failed", "step_failed", 2)
    assert failed["message"].startswith("Step 2 of 3 failed: `fail 3` exited with status 3.")
    assert world.containers.ran == ["write etc/a x", "fail 3"]
    assert not world.store.exists("img_1")
    status = world.builds.status("img_1")
    assert status.state == "failed"
    assert status.error is not None and status.error["code"] == "step_failed"
    assert status.last_seq == len(events)
    world.check_clean()


@pytest.mark.parametrize(
    ("step", "code", "words"),
    [
        ("signal 9", "step_failed", "was killed by signal 9 (SIGKILL)"),
        ("signal 11", "step_failed", "was killed by signal 11 (SIGSEGV)"),
        ("oom", "out_of_memory", "ran out of memory. A build has 4096 MiB"),
        ("fill", "out_of_disk", "ran out of disk. A build has 20480 MiB"),
        ("vanish", "step_failed", "the build's container stopped while `vanish`"),
    ],
)
async def test_how_a_step_ended_is_said(world: World, step: str, code: str, words: str) -> None:
    failed = (await world.build(step))[-1]
    assert (failed["code"], failed["step"]) == (code, 1)
    assert words in failed["message"]
    world.check_clean()


@pytest.mark.parametrize(
    ("command", "quoted", "named"),
    [
        ("fail\u00a0it", "`fail⟨U+00A0⟩it`", "U+00A0, no-break space (line 1, character 5)"),
        ("true\nec\u200bho", "`true\nec⟨U+200B⟩ho`", "zero width space (line 2, character 3)"),
        ("a\rb", "`a⟨U+000D⟩b`", "U+000D, a control character (line 1, character 2)"),
        (
            "echo \u201chi\u201d",
            "`echo \u201chi\u201d`",
            "\u201c U+201C (line 1, character 6), \u201d U+201D",
        ),
    ],
)
def test_a_character_that_cannot_be_seen_is_shown_and_placed(
    command: str, quoted: str, named: str
) -> None:
    said = step_failed(1, 1, command, "", Exited(127, None, 5), ()).detail
    assert quoted in said
    assert named in said


def test_a_step_of_letters_in_any_language_has_nothing_odd() -> None:
    said = step_failed(1, 1, "echo 'äé 日本 😀'\n\tfalse", "", Exited(1, None, 5), ()).detail
    assert said.startswith(
        "Step 1 of 1 failed: `echo 'äé 日本 😀'\n\tfalse` exited with status 1.\n\nIt"
    )


async def test_what_is_left_in_memory_is_told_once_at_its_step(world: World) -> None:
    events = await world.build(
        "write workspace/app/x 1",
        "write tmp/tmp.AbCdEfGhIj 1",
        "write workspace/app/y 2",
        "write tmp/kept 3",
    )
    told = [event for event in events if event["kind"] == "not_captured"]
    assert [(event["step"], event["paths"]) for event in told] == [
        (1, ["/workspace/app"]),
        (4, ["/tmp/kept"]),
    ]
    assert "This step left /workspace/app." in told[0]["message"]


async def test_what_a_later_step_takes_away_is_not_told(world: World) -> None:
    events = await world.build("write tmp/archive 1", "remove tmp/archive", "say hello")
    assert [event for event in events if event["kind"] == "not_captured"] == []


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


async def test_the_end_of_the_output_is_in_the_message(world: World) -> None:
    failed = (await world.build("moan E: \x1b[31mnope\x1b[0m"))[-1]
    assert failed["message"].endswith("The end of its output:\nE: nope")


async def test_what_a_step_was_refused_is_told_though_it_succeeded(world: World) -> None:
    world.refused = [
        Refused("example.org", 443, "not_listed"),
        Refused("10.0.0.1", 80, "not_https"),
    ]
    events = await world.build("say hello")
    finished = next(event for event in events if event["kind"] == "step_finished")
    assert events[-1]["kind"] == "published"
    listed = {"host": "example.org", "port": 443, "reason": "not_listed", "direct": False}
    plain = {"host": "10.0.0.1", "port": 80, "reason": "not_https", "direct": False}
    assert finished["refused"] == [
        {**listed, "can_be_listed": True},
        {**plain, "can_be_listed": False},
    ]


async def test_a_step_that_changes_what_the_host_lends_is_told_that_it_is_in_vain(
    world: World,
) -> None:
    events = await world.build("write etc/conf x", "write etc/resolv.conf theirs", "say done")
    (told,) = [event for event in events if event["kind"] == "not_captured"]
    assert (told["step"], told["paths"]) == (2, ["/etc/resolv.conf"])
    assert told["message"].startswith("This step changed /etc/resolv.conf. That is not kept")


async def test_what_the_network_refused_is_in_the_message(world: World) -> None:
    world.refused = [
        Refused("example.org", 443, "not_listed"),
        Refused("10.0.0.1", 80, "address_literal"),
    ]
    failed = (await world.build("fail 7"))[-1]
    assert "the network policy refused: example.org:443, 10.0.0.1:80." in failed["message"]
    assert '"allow_domains" (beside "@default"' in failed["message"]
    assert (failed["code"], failed["refused"]) == ("network_policy_blocked", ["example.org"])
    assert 'network "open"' in failed["message"]


async def test_a_refusal_that_no_list_would_lift_offers_none(world: World) -> None:
    world.refused = [Refused("example.org", 80, "not_https")]
    failed = (await world.build("fail 1"))[-1]
    assert failed["code"] == "network_policy_blocked"
    assert "use https:// addresses" in failed["message"]
    assert "refused" not in failed


async def test_what_was_asked_of_dns_is_told_with_what_its_program_needs(world: World) -> None:
    world.refused = [Refused("keys.example", 0, "not_listed", direct=True)]
    failed = (await world.build("fail 2"))[-1]
    assert (failed["code"], failed["refused"]) == ("network_policy_blocked", ["keys.example"])
    assert "the network policy refused: keys.example (by DNS)." in failed["message"]
    for part in ('"allow_domains"', "$HTTPS_PROXY", 'network "open"'):
        assert part in failed["message"]


async def test_a_build_without_network_is_told_which_to_take(world: World) -> None:
    world.refused = [Refused("keys.example", 0, "network_off", direct=True)]
    failed = (await world.build("fail 2", network="off"))[-1]
    assert (failed["code"], "refused" in failed) == ("network_policy_blocked", False)
    assert 'has network "off"' in failed["message"]
    assert "$HTTPS_PROXY" not in failed["message"]


async def test_a_host_that_cannot_be_reached_is_no_refusal(world: World) -> None:
    world.unreached = ["a.test is allowed, but could not be reached: it refused the connection"]
    failed = (await world.build("fail 7"))[-1]
    assert (failed["code"], "refused" in failed) == ("step_failed", False)
    assert f"with the policy's leave: {world.unreached[0]}." in failed["message"]
    assert "network policy refused" not in failed["message"]


async def test_a_step_that_takes_too_long(world: World) -> None:
    # What waits for a host that does not answer often waits for longer than a step may.
    world.unreached = ["a.test is allowed, but could not be reached: it did not answer"]
    failed = (await world.build("sleep 5", step_timeout_seconds=0.05))[-1]
    assert (failed["code"], failed["step"]) == ("step_timeout", 1)
    assert f"with the policy's leave: {world.unreached[0]}." in failed["message"]
    assert "still running after 0.05 seconds" in failed["message"]
    world.check_clean()


async def test_a_build_that_takes_too_long(world: World) -> None:
    events = await world.build("sleep 0.05", "sleep 5", build_timeout_seconds=0.1)
    failed = events[-1]
    assert (failed["code"], failed["step"]) == ("build_timeout", 2)
    assert "a whole build may take" in failed["message"]
    world.check_clean()


async def test_the_same_id_starts_once(world: World) -> None:
    request = BuildRequest("img_1", "debian-12", ("sleep 0.1", "write etc/a x"), "restricted")
    assert world.builds.start(request)[1] is True
    status, new = world.builds.start(request)
    assert (status.state, new) == ("running", False)
    await world.events()
    status, new = world.builds.start(request)
    assert (status.state, new) == ("published", False)
    assert world.containers.ran == ["sleep 0.1", "write etc/a x"]


async def test_two_builds_run_at_once(world: World) -> None:
    for number in (1, 2, 3):
        world.start("sleep 0.1", f"write etc/which {number}", build_id=f"img_{number}")
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


async def test_a_missing_base_is_said(world: World) -> None:
    failed = (await world.build("say x", base_image="img_gone"))[-1]
    assert failed["code"] == "base_missing"
    assert "img_gone" in failed["message"]
    world.check_clean()


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
    def defect(*_: object) -> list[Refused]:
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
        world.start("say x", network=network)
    assert tree_of(world.paths.builds) == set()


@pytest.mark.parametrize("build_id", ["", "../x", "a/b", ".x"])
async def test_a_bad_id_starts_nothing(world: World, build_id: str) -> None:
    with pytest.raises(InvalidRequest):
        world.start("say x", build_id=build_id)
    with pytest.raises(NotFound):
        world.builds.status(build_id)
    assert tree_of(world.paths.builds) == set()


# Cancelling -------------------------------------------------------------------------------


@pytest.mark.parametrize("delay", [0.0, 0.001, 0.02, 0.06, 0.1])
async def test_cancelling_at_any_time_leaves_nothing(world: World, delay: float) -> None:
    world.containers.start_seconds = 0.03
    world.start("write etc/a x", "sleep 0.05", "write etc/b x")
    await asyncio.sleep(delay)
    await world.builds.cancel("img_1")
    assert world.builds.status("img_1").state == "cancelled"
    assert not world.store.exists("img_1")
    world.check_clean()
    await world.builds.cancel("img_1")
    last = (await world.events())[-1]
    # The longest of the delays may let it be published first; then it is taken back.
    assert last["kind"] == "published" or last["code"] == "build_cancelled"


@pytest.mark.parametrize("phase", ["staging", "publish", "acquire"])
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
        if phase == "acquire":
            ask()
        else:
            loop.call_soon_threadsafe(ask)
            time.sleep(0.1)
        return real(*args, **options)

    monkeypatch.setattr(world.store, phase, held)
    world.start("write etc/a x")
    events = await world.events()
    await cancelling[0]
    assert events[-1]["code"] == "build_cancelled"
    assert world.builds.status("img_1").state == "cancelled"
    assert not world.store.exists("img_1")
    world.check_clean()


async def test_a_cancellation_races_the_publishing_and_one_of_them_wins(world: World) -> None:
    """A hundred times, at any instant around it: never both, never neither."""
    spread = random.Random(6)
    outcomes: dict[str, int] = {"published": 0, "cancelled": 0}
    wait = 0.02
    for number in range(100):
        build_id = f"img_{number}"
        world.start("write etc/a x", build_id=build_id)
        await asyncio.sleep(spread.uniform(0.7, 1.3) * wait)
        await world.builds.cancel(build_id, keep_published=True)
        state = world.builds.status(build_id).state
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
    world.start("write etc/a x")
    await asyncio.to_thread(publishing.wait, 5)
    await world.builds.cancel("img_1", keep_published=keep)
    assert (await world.events())[-1]["kind"] == "published"
    assert world.store.exists("img_1") == keep
    assert world.builds.status("img_1").state == ("published" if keep else "cancelled")


async def test_whoever_was_ended_cannot_publish_however_late(world: World) -> None:
    staged = world.store.staging("img_1")
    grow(staged / "tree", {"etc/a": "late"})
    assert world.store.revoke("img_1")
    with pytest.raises(ImageRevokedError):
        world.store.publish(staged, ImageManifest("img_1", "template", None, 1.0, 1, 1, 0))
    assert not world.store.exists("img_1")
    world.store.reinstate("img_1")
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
    world.start("write etc/a x")
    await asyncio.to_thread(flushing.wait, 5)
    await world.builds.cancel("img_1")
    assert not go_on.is_set()
    world.check_clean()
    go_on.set()


async def test_cancelling_a_published_build_deletes_its_image(world: World) -> None:
    await world.build("write etc/a x")
    await world.builds.cancel("img_1")
    assert not world.store.exists("img_1")
    assert world.builds.status("img_1").state == "cancelled"
    assert world.store.trash.wait()
    world.check_clean()


async def test_a_cancellation_that_comes_first_wins(world: World) -> None:
    await world.builds.cancel("img_1")
    world.start("write etc/a x")
    assert world.builds.status("img_1").state == "cancelled"
    assert world.containers.ran == []
    assert [event["code"] for event in await world.events()] == ["build_cancelled"]


async def test_cancelling_twice_at_once(world: World) -> None:
    world.start("sleep 5")
    await asyncio.sleep(0.02)
    await asyncio.gather(world.builds.cancel("img_1"), world.builds.cancel("img_1"))
    world.check_clean()


# An agent that stops ----------------------------------------------------------------------


async def test_an_agent_that_stops_ends_its_builds(world: World) -> None:
    world.start("sleep 5")
    await asyncio.sleep(0.02)
    await world.builds.close()
    status = world.builds.status("img_1")
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
    assert world.builds.status("img_1").state == "failed"
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
    assert world.builds.status("img_1").state == "published"
    assert world.store.exists("img_1")


async def test_a_build_killed_after_its_last_event_keeps_it(world: World) -> None:
    await world.build("fail 1")
    record = read_json(world.paths.builds / "img_1/build.json") or {}
    write_json(
        world.paths.builds / "img_1/build.json", {**record, "state": "running", "error": None}
    )
    world.restart()
    await world.builds.recover()
    status = world.builds.status("img_1")
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
