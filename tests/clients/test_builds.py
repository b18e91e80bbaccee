"""How builds end, on real containers: every code, and cancelling at any moment."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.clients.making import Sandboxes, Templates
from tests.clients.streaming import events_of
from tests.processes import commands_containing, own_mark
from tests.stack import Stack, wait_for

# Refused by name before anybody resolves it: no packet leaves for it.
FETCH = "python3 -c \"import urllib.request as u; u.urlopen('https://nowhere.invalid/x')\""
# Forgets its parent, ignores what can be ignored, and goes on in a session of its own.
STUBBORN = "trap '' TERM INT HUP; (setsid sh -c 'trap \"\" TERM; sleep {0}' &) ; sleep {0}"


@pytest.mark.parametrize(
    ("code", "base", "recipe", "limits"),
    [
        ("step_failed", "debian-12", ["true", "exit 3"], {}),
        ("step_timeout", "debian-12", ["true", "sleep 60"], {"step_timeout_seconds": 1}),
        ("build_timeout", "debian-12", ["sleep 1", "sleep 60"], {"build_timeout_seconds": 2}),
        ("out_of_memory", "debian-12", ["true", "tail /dev/zero"], {}),
        ("out_of_disk", "debian-12", ["true", "cat /dev/zero > /root/x"], {"disk_mb": 256}),
        ("network_policy_blocked", "python-3.12-bare", ["true", FETCH], {}),
    ],
)
def test_each_failure_has_its_own_code(
    templates: Templates, code: str, base: str, recipe: list[str], limits: dict[str, int]
) -> None:
    failed = templates.finished(templates.create(base, *recipe, **limits))
    assert (failed["status"], failed["error_code"]) == ("failed", code), failed
    assert recipe[1] in failed["error_message"]
    assert [step["status"] for step in failed["steps"]] == ["succeeded", "failed"]
    last = templates.events(failed["id"])[-1]
    assert (last["kind"], last["code"]) == ("failed", code)


def cancel(templates: Templates, template: str) -> httpx.Response:
    return templates.client.post(f"/v1/templates/{template}/cancel", json={})


def cancelled(templates: Templates, template: str) -> dict[str, Any]:
    """Cancel a build that has not ended; how it is then."""
    answer = cancel(templates, template)
    assert answer.status_code == 200, answer.text
    said: dict[str, Any] = answer.json()
    assert (said["status"], said["error_code"]) == ("failed", "build_cancelled")
    assert "cancelled by" in said["error_message"]
    return said


def test_a_step_that_will_not_go_is_gone(stack: Stack, templates: Templates) -> None:
    mark = own_mark()
    template = templates.create("debian-12", STUBBORN.format(mark))
    wait_for(lambda: len(commands_containing(f"sleep {mark}")) >= 2, 30, stack.explain)
    cancelled(templates, template)
    wait_for(lambda: commands_containing(mark) == [], 30, stack.explain)
    assert templates.get(template)["status"] == "failed"


PHASES = {
    "at once": None,
    "boot": "boot",
    "step": "output",
    "scrub": "step_finished",
    "capture": "scrub",
    "publish": "capture",
}


@pytest.mark.parametrize("after", PHASES.values(), ids=PHASES.keys())
def test_a_build_can_be_cancelled_in_every_phase(
    stack: Stack, templates: Templates, after: str | None
) -> None:
    """``after`` is the event on which it is cancelled; where it had ended by then, that is said."""
    with stack.host() as host:
        before = {image.id for image in host.images()}
    # Many files, so that scrubbing and capturing take a while.
    many = "mkdir /root/m && cd /root/m && seq 20000 | xargs touch; echo now; sleep 0.3"
    template = templates.create("debian-12", many)
    if after is not None:
        for event in events_of(stack, template):
            if event["kind"] == after:
                break
    answer = cancel(templates, template)
    record = templates.get(template)
    if answer.status_code == 409:
        assert record["status"] == "ready", record
        return
    assert record["error_code"] == "build_cancelled"
    with stack.host() as host:
        wait_for(lambda: {image.id for image in host.images()} <= before, 15, stack.explain)
    wait_for(lambda: nothing_is_left(stack), 15, stack.explain)


def nothing_is_left(stack: Stack) -> bool:
    """No build has a disk, a staged tree or a container now."""
    state = stack.layout.state_dir
    return not list((state / "disks").glob("img_*.img")) and not list((state / "staging").iterdir())


def test_forty_races_with_publishing_have_one_outcome_each(
    stack: Stack, templates: Templates, sandboxes: Sandboxes
) -> None:
    """Cancelled or ready, and never something between: whichever was said stays so."""
    with stack.host() as host:
        before = {image.id for image in host.images()}
    outcomes = {"cancelled": 0, "ready": 0}
    delay = 0.2
    for round_ in range(10):
        with ThreadPoolExecutor(4) as pool:
            made = [templates.create("debian-12", f"echo {round_}") for _ in range(4)]
            answers = list(pool.map(lambda one: cancel_late(stack, one, delay), made))  # noqa: B023
        # Towards the moment at which half of them are too late, wherever this machine has it.
        late = sum(answer.status_code == 409 for answer in answers)
        delay *= (1.5, 1.2, 1, 0.8, 0.6)[late]
        for template, answer in zip(made, answers, strict=True):
            record = templates.get(template)
            if answer.status_code == 200:
                outcomes["cancelled"] += 1
                assert (record["status"], record["error_code"]) == ("failed", "build_cancelled")
            else:
                outcomes["ready"] += 1
                assert (answer.status_code, record["status"]) == (409, "ready"), record
        survivors = [one for one in made if templates.get(one)["status"] == "ready"]
        with stack.host() as host:
            wait_for(lambda: len(fresh(host, before)) == len(survivors), 15, stack.explain)  # noqa: B023
        for template in survivors:
            assert sandboxes.boot(template).exec("true").exit_code == 0
        sandboxes.terminate_all()
        sandboxes.booted.clear()
        templates.delete_all()
    assert sum(outcomes.values()) == 40
    # Some were too late, or it was no race.
    assert min(outcomes.values()) > 0


def fresh(host: Any, before: set[str]) -> set[str]:
    """The images that were not there before."""
    return {image.id for image in host.images()} - before


def cancel_late(stack: Stack, template: str, delay: float) -> httpx.Response:
    """Cancel a build some ``delay`` seconds after its last step, about when it is published."""
    for event in events_of(stack, template):
        if event["kind"] == "step_finished":
            break
    time.sleep(random.uniform(0.5, 1.5) * delay)
    with stack.client() as client:
        return client.post(f"/v1/templates/{template}/cancel", json={})


def test_deleting_a_building_template_ends_its_build(stack: Stack, templates: Templates) -> None:
    mark = own_mark()
    template = templates.create("debian-12", STUBBORN.format(mark))
    wait_for(lambda: len(commands_containing(f"sleep {mark}")) >= 2, 30, stack.explain)
    templates.delete(template)
    wait_for(lambda: commands_containing(mark) == [], 30, stack.explain)
    wait_for(lambda: nothing_is_left(stack), 15, stack.explain)


def printing(seconds: int) -> list[str]:
    """A recipe that prints for so long, at an uneven pace."""
    loop = f"for i in $(seq {seconds * 9}); do seq $((i * 7 % 500)); sleep 0.1$((i % 3)); done"
    return ["echo begin", loop, "echo 'done: ä€😀'"]


@pytest.fixture
def noisy(templates: Templates) -> str:
    """A build that prints for some seconds."""
    return templates.create("debian-12", *printing(8))


def test_a_stream_resumed_at_random_is_the_same_as_the_whole(
    stack: Stack, templates: Templates
) -> None:
    """Fifty times while the build goes on, however long that takes; then it may end."""
    template = templates.create("debian-12", *printing(240))
    found: list[dict[str, Any]] = []
    for _ in range(50):
        stay = random.randrange(1, 4)
        for event in events_of(stack, template, last_event_id=found[-1]["seq"] if found else 0):
            found.append(event)
            if (stay := stay - 1) == 0:
                break
    assert templates.get(template)["status"] == "building"
    cancelled(templates, template)
    found += events_of(stack, template, last_event_id=found[-1]["seq"])
    assert found[-1]["kind"] == "failed"
    assert found == templates.events(template)


def test_fifty_visits_to_a_finished_build_are_the_same(
    stack: Stack, templates: Templates, noisy: str
) -> None:
    templates.finished(noisy)
    whole = templates.events(noisy)
    for _ in range(50):
        after = random.randrange(len(whole))
        assert list(events_of(stack, noisy, last_event_id=after)) == whole[after:]


def test_two_hundred_viewers_are_served(stack: Stack, noisy: str) -> None:
    with ThreadPoolExecutor(200) as pool:
        seen = list(pool.map(lambda _: list(events_of(stack, noisy)), range(200)))
    assert seen[0][-1]["kind"] == "published"
    assert all(events == seen[0] for events in seen)


def test_a_viewer_that_does_not_read_holds_up_nobody(stack: Stack, templates: Templates) -> None:
    template = templates.create("debian-12", "seq 400000")
    headers = {"Authorization": f"Bearer {stack.api_key}"}
    url = f"{stack.url}/v1/templates/{template}/events?follow=true"
    with httpx.stream("GET", url, headers=headers, trust_env=False, timeout=60) as stalled:
        assert stalled.status_code == 200
        assert templates.finished(template)["status"] == "ready"
        assert list(events_of(stack, template)) == templates.events(template)


def test_the_whole_log_can_be_saved(templates: Templates) -> None:
    template = templates.create("debian-12", "seq 100000", "printf '\\033[31mred\\033[0m\\n'")
    assert templates.finished(template)["status"] == "ready"
    text = templates.client.get(f"/v1/templates/{template}/log").text
    numbers = [line for line in text.splitlines() if line.isdigit()]
    assert numbers == [str(number) for number in range(1, 100_001)]
    assert "\nred\n" in text


def test_completed_steps_are_reused_when_asked_and_only_then(
    templates: Templates, sandboxes: Sandboxes
) -> None:
    """Each run of a step leaves another random number, so that what was not run again shows."""
    random_number = "od -An -N8 -tx8 /dev/urandom"
    recipe = [f"{random_number} > /root/first", f"{random_number} | tee /root/second /tmp/kept"]
    failing = templates.create("debian-12", *recipe, "cat /root/second; exit 1")
    failed = templates.finished(failing)
    printed = failed["steps"][1]["output"]
    assert printed.strip()

    retried = templates.finished(
        templates.create("debian-12", *recipe, "cp /tmp/kept /root/third", reuse="failed")
    )
    states = [step["status"] for step in retried["steps"]]
    assert (retried["status"], states) == ("ready", ["cached", "cached", "succeeded"]), retried
    assert all(step["cached_at"] <= retried["created_at"] for step in retried["steps"][:2])
    assert [
        event["step"] for event in templates.events(retried["id"]) if event["kind"] == "step_cached"
    ] == [1, 2]
    found = sandboxes.boot(retried["id"]).exec("cat /root/second /root/third").stdout
    assert found == printed * 2

    anew = templates.ready("debian-12", *recipe, "cp /tmp/kept /root/third")
    assert sandboxes.boot(anew).exec("cat /root/second").stdout not in {"", printed}


@pytest.mark.parametrize(
    "changes", [{"network": "open"}, {"disk_mb": 512}, {"recipe": ["echo changed", "true"]}]
)
def test_what_is_not_the_same_is_run_again(templates: Templates, changes: dict[str, Any]) -> None:
    recipe = ["echo one", "echo two", "false"]
    assert templates.finished(templates.create("debian-12", *recipe))["status"] == "failed"
    changed = changes.pop("recipe", recipe[:2])
    again = templates.finished(templates.create("debian-12", *changed, reuse="failed", **changes))
    assert [step["status"] for step in again["steps"]] == ["succeeded", "succeeded"]
