"""A build that makes very many small files, on real LXC: told of, cancelled, and weighed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise

import pytest

from hostruntime.errors import HostError
from hostruntime.image.digest import image_digest
from hostruntime.image.trees import measure
from hostruntime.wire.builds import StartBuild
from hostruntime.wire.commands import Exec
from tests.host.agent import Agent
from tests.host.client import HostClient
from tests.host.conftest import BASE, NewSandbox

pytestmark = pytest.mark.host

FILES = 60_000
# One program, as an installer is, and not a process for each file.
MANY = f"""perl -e '
for my $d (0..{FILES // 100 - 1}) {{
    mkdir "/srv/$d";
    for my $f (0..99) {{ open(my $o, ">", "/srv/$d/$f"); print $o "file $f of $d\\n" x ($f + 1) }}
}}'"""


@pytest.fixture
def image(host: HostClient) -> Iterator[str]:
    name = f"img_many{time.time_ns():x}"
    yield name
    with suppress(HostError):
        host.cancel_build(name)


def test_the_making_of_a_large_image_is_told_and_the_image_is_whole(
    agent: Agent, host: HostClient, image: str, new_sandbox: NewSandbox
) -> None:
    host.start_build(StartBuild(image, base_image=BASE, recipe=(MANY,), network="restricted"))
    events = list(host.build_events(image))
    assert events[-1].kind == "published", events[-1]
    ended = next(n for n, event in enumerate(events) if event.kind == "step_finished")
    told = [event for event in events[ended:] if event.kind == "progress"]
    assert told
    assert all(event.data["phase"] in {"capture", "scrub", "contents", "publish"} for event in told)
    for before, after in pairwise(told):
        if before.data["phase"] == after.data["phase"]:
            assert before.data["files"] <= after.data["files"]
            assert before.data["bytes"] <= after.data["bytes"]
    assert max(event.data["files"] for event in told) <= events[-1].data["file_count"] + 1000
    trees = agent.state / "images"
    tree, base = trees / image / "tree", trees / BASE / "tree"
    digest = host.image(image).digest
    assert digest == image_digest(tree, base, host.image(BASE).digest or "")
    usage = host.image_usage(image)
    assert usage.reclaimable_bytes == usage.size_bytes - measure(tree).shared_bytes
    sandbox = new_sandbox(image=image)
    said = host.exec(sandbox.id, Exec("find /srv -type f | wc -l; tail -n 1 /srv/599/99")).stdout
    assert said.decode().split("\n")[:2] == [str(FILES), "file 99 of 599"]


def test_a_cancelled_capture_ends_at_once_and_leaves_nothing(
    agent: Agent, host: HostClient, image: str
) -> None:
    host.start_build(StartBuild(image, base_image=BASE, recipe=(MANY,), network="restricted"))
    for event in host.build_events(image):
        assert event.kind != "published"
        if event.kind == "progress":
            break
    began = time.monotonic()
    host.cancel_build(image)
    assert time.monotonic() - began < 10
    assert [event.kind for event in host.build_events(image)][-1] == "failed"
    for place in ("images", "staging", "disks"):
        assert not list((agent.state / place).glob(f"{image}*"))
