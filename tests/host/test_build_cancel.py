"""Cancelling a real build in each of its phases: nothing of it is left, and nothing comes after."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from hostruntime.errors import HostError, ImageNotFound
from hostruntime.wire.builds import BuildEvent, StartBuild
from tests.host.agent import Agent, children_named, eventually, groups_named, mounts_below
from tests.host.client import HostClient
from tests.host.conftest import BASE

pytestmark = pytest.mark.host

# Ignores TERM, and so does what it forked away from itself, twice.
STUBBORN = """
trap '' TERM HUP INT
mark=$1
(setsid sh -c "trap '' TERM HUP; (setsid sh -c 'trap \\"\\" TERM; while :; do sleep 1; done' &) ;
while :; do sleep 1; done" &)
echo stubborn
while :; do sleep 1; done
"""
LITTER = "mkdir /var/cache/litter && cd /var/cache/litter && seq 60000 | xargs touch && echo done"
BALLAST = "head -c 300M /dev/urandom > /srv/ballast; seq 20000 | (cd /srv && xargs touch)"


@pytest.fixture
def build_id(host: HostClient) -> Iterator[str]:
    name = f"img_cancel{time.time_ns():x}"
    yield name
    with suppress(HostError):
        host.cancel_build(name)


def start(host: HostClient, build_id: str, *recipe: str) -> None:
    host.start_build(StartBuild(build_id, base_image=BASE, recipe=recipe, network="restricted"))


def await_event(host: HostClient, build_id: str, kind: str, text: str = "") -> BuildEvent:
    for event in host.build_events(build_id):
        if event.kind == kind and text in str(event.data):
            return event
    raise AssertionError(f"the build ended without {kind}")


def traces(agent: Agent, build_id: str) -> list[str]:
    """What there is of a build on the host, its record left out."""
    name = f"{agent.prefix}{build_id}"
    run = Path("/run/orkestr") / agent.prefix.removeprefix("ork").rstrip("-")
    builds = agent.state / "builds" / build_id
    return [
        *groups_named(name),
        *mounts_below(run / "roots" / name),
        *map(str, (run / "disks").glob(build_id)),
        *map(str, (agent.state / "disks").glob(f"{build_id}*")),
        *map(str, (agent.state / "staging").glob(f"{build_id}*")),
        *map(str, (agent.state / "images").glob(f"{build_id}*")),
        *map(str, (agent.state / "images").glob(f"*/users/{build_id}")),
        *children_named(name),
        *(str(path) for path in builds.iterdir() if path.suffix not in {".json", ".ndjson"}),
    ]


def check_cancelled(agent: Agent, build_id: str) -> None:
    host = agent.client
    last = list(host.build_events(build_id))[-1]
    assert (last.kind, last.data["code"]) == ("failed", "build_cancelled")
    assert host.build(build_id).state == "cancelled"
    with pytest.raises(ImageNotFound):
        host.image(build_id)
    # LXC's log is kept with the record until that is forgotten.
    for _ in eventually():
        if [trace for trace in traces(agent, build_id) if not trace.endswith("lxc.log")] == []:
            break


@pytest.mark.parametrize("wait", [0.0, 0.01, 0.03, 0.06])
def test_in_boot(agent: Agent, host: HostClient, build_id: str, wait: float) -> None:
    start(host, build_id, "sleep 60")
    time.sleep(wait)
    assert host.cancel_build(build_id).state == "cancelled"
    check_cancelled(agent, build_id)


def test_in_a_step_that_ignores_it_and_forks_away(
    agent: Agent, host: HostClient, build_id: str
) -> None:
    start(host, build_id, "true", STUBBORN)
    await_event(host, build_id, "output", "stubborn")
    assert host.cancel_build(build_id).state == "cancelled"
    check_cancelled(agent, build_id)


def test_while_everything_is_captured(agent: Agent, host: HostClient, build_id: str) -> None:
    start(host, build_id, BALLAST)
    await_event(host, build_id, "step_finished")
    assert host.cancel_build(build_id).state == "cancelled"
    check_cancelled(agent, build_id)


WAITS = (0.0, 0.3, 0.6)


@pytest.mark.parametrize("wait", WAITS)
def test_while_everything_is_scrubbed(
    agent: Agent, host: HostClient, build_id: str, wait: float
) -> None:
    start(host, build_id, LITTER)
    await_event(host, build_id, "step_finished")
    time.sleep(wait)
    if host.cancel_build(build_id, keep_published=True).state == "published":
        # This machine was quicker; the shortest wait is one that none is.
        assert wait > min(WAITS)
        assert host.image(build_id).id == build_id
    else:
        check_cancelled(agent, build_id)


# So many builds that are published, and as many that are not, are enough.
OFTEN = 8


def test_at_any_instant_around_the_publishing(agent: Agent, host: HostClient) -> None:
    """Never an image after a cancellation was answered, never one lost before."""
    wait, outcomes = 0.1, {"published": 0, "cancelled": 0}
    for number in range(30):
        name = f"img_race{time.time_ns():x}{number}"
        start(host, name, "echo x > /srv/x")
        await_event(host, name, "step_finished")
        time.sleep(wait)
        state = host.cancel_build(name, keep_published=True).state
        outcomes[state] += 1
        # To the instant by leaps, as fast or slow as this machine may be, and then around it.
        step = 1.1 if all(outcomes.values()) else 2
        wait = wait / step if state == "published" else wait * step
        if state == "published":
            assert host.image(name).id == name
            assert host.cancel_build(name).state == "cancelled"
        else:
            check_cancelled(agent, name)
        assert name not in [image.id for image in host.images()]
        if min(outcomes.values()) >= OFTEN:
            break
    assert min(outcomes.values()) > 0, outcomes
