"""What a build over containers that are directories says of its steps: how, why, and in vain."""

from __future__ import annotations

import pytest

from hostruntime.build.report import RefusedHost, UnreachedNotice, step_failed
from hostruntime.container.exec import Exited
from tests.hostruntime.build_world import World
from tests.hostruntime.build_world import world as world


async def test_a_failing_step_stops_the_build(world: World) -> None:
    events = await world.build("write etc/a x", "fail 3", "write etc/never x")
    failed = events[-1]
    assert (failed["kind"], failed["code"], failed["step"]) == ("failed", "step_failed", 2)
    assert failed["message"].startswith("Step 2 of 3 failed: `fail 3` exited with status 3.")
    assert world.containers.ran == ["write etc/a x", "fail 3"]
    assert not world.store.exists("img_1")
    status = await world.builds.status("img_1")
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


async def test_that_no_command_can_be_followed_any_more_is_no_defect_of_the_recipe(
    world: World,
) -> None:
    failed = (await world.build("lose"))[-1]
    assert failed["code"] == "host_lost"
    assert "process that starts commands died" in failed["message"]
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


async def test_the_end_of_the_output_is_in_the_message(world: World) -> None:
    failed = (await world.build("moan E: \x1b[31mnope\x1b[0m"))[-1]
    assert failed["message"].endswith("The end of its output:\nE: nope")


async def test_what_a_step_was_refused_is_told_though_it_succeeded(world: World) -> None:
    world.refused = [
        RefusedHost("example.org", 443, "not_listed"),
        RefusedHost("10.0.0.1", 80, "not_https"),
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
    assert told["message"].startswith("This step changed /etc/resolv.conf. This isn't kept")


async def test_what_the_network_refused_is_in_the_message(world: World) -> None:
    world.refused = [
        RefusedHost("example.org", 443, "not_listed"),
        RefusedHost("10.0.0.1", 80, "address_literal"),
    ]
    failed = (await world.build("fail 7"))[-1]
    assert "the network policy refused: example.org:443, 10.0.0.1:80." in failed["message"]
    assert '"allow_domains" (along with "@default"' in failed["message"]
    assert (failed["code"], failed["refused"]) == ("network_policy_blocked", ["example.org"])
    assert 'network "open"' in failed["message"]


async def test_a_refusal_that_no_list_would_lift_offers_none(world: World) -> None:
    world.refused = [RefusedHost("example.org", 80, "not_https")]
    failed = (await world.build("fail 1"))[-1]
    assert failed["code"] == "network_policy_blocked"
    assert "use https:// addresses" in failed["message"]
    assert "refused" not in failed


async def test_what_was_asked_of_dns_is_told_with_what_its_program_needs(world: World) -> None:
    world.refused = [RefusedHost("keys.example", 0, "not_listed", direct=True)]
    failed = (await world.build("fail 2"))[-1]
    assert (failed["code"], failed["refused"]) == ("network_policy_blocked", ["keys.example"])
    assert "the network policy refused: keys.example (by DNS)." in failed["message"]
    for part in ('"allow_domains"', "$HTTPS_PROXY", 'network "open"'):
        assert part in failed["message"]


async def test_a_build_without_network_is_told_which_to_take(world: World) -> None:
    world.refused = [RefusedHost("keys.example", 0, "network_off", direct=True)]
    failed = (await world.build("fail 2", network="off"))[-1]
    assert (failed["code"], "refused" in failed) == ("network_policy_blocked", False)
    assert 'has network "off"' in failed["message"]
    assert "$HTTPS_PROXY" not in failed["message"]


async def test_a_host_that_cannot_be_reached_is_no_refusal(world: World) -> None:
    why = "a.test is allowed, but could not be reached: it refused the connection"
    world.unreached = [UnreachedNotice(why)]
    failed = (await world.build("fail 7"))[-1]
    assert (failed["code"], "refused" in failed) == ("step_failed", False)
    assert f"although the policy allows it: {why}." in failed["message"]
    assert "network policy refused" not in failed["message"]


async def test_a_step_that_did_without_an_allowed_host_says_so(world: World) -> None:
    """`curl … | bash` of a host that is down succeeds with nothing."""
    why = "a.test is allowed, but could not be reached: it refused the connection"
    world.unreached = [
        UnreachedNotice(why),
        UnreachedNotice("b.test was asked of DNS", direct=True),
    ]
    events = await world.build("write a 1")
    (told,) = [event for event in events if event["kind"] == "not_reached"]
    assert (told["step"], why in told["message"], "b.test" in told["message"]) == (1, True, False)
    assert events[-1]["kind"] == "published"


async def test_a_step_that_takes_too_long(world: World) -> None:
    # What waits for a host that does not answer often waits for longer than a step may.
    why = "a.test is allowed, but could not be reached: it did not answer"
    world.unreached = [UnreachedNotice(why)]
    failed = (await world.build("sleep 5", step_timeout_seconds=0.05))[-1]
    assert (failed["code"], failed["step"]) == ("step_timeout", 1)
    assert f"although the policy allows it: {why}." in failed["message"]
    assert "still running after 0.05 seconds" in failed["message"]
    world.check_clean()


async def test_a_build_that_takes_too_long(world: World) -> None:
    events = await world.build("sleep 0.05", "sleep 60", build_timeout_seconds=2)
    failed = events[-1]
    assert (failed["code"], failed["step"]) == ("build_timeout", 2)
    assert "the limit for a whole build" in failed["message"]
    world.check_clean()


async def test_a_missing_base_is_said(world: World) -> None:
    failed = (await world.build("say x", base_image="img_gone"))[-1]
    assert failed["code"] == "base_missing"
    assert "img_gone" in failed["message"]
    world.check_clean()
