"""What a real build tells of itself: codes, sizes, contents."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from hostruntime.errors import HostError, NotFound
from hostruntime.wire.builds import BuildEvent, StartBuild
from hostruntime.wire.commands import Exec
from tests.host.agent import Agent
from tests.host.client import HostClient
from tests.host.conftest import BASE, NewSandbox

pytestmark = [pytest.mark.host, pytest.mark.pythons]

Build = Callable[..., list[BuildEvent]]


@pytest.fixture
def build(host: HostClient) -> Iterator[Build]:
    """Runs a build to its end; what it published is deleted when the test ends."""
    made: list[str] = []

    def run(*recipe: str, **options: object) -> list[BuildEvent]:
        made.append(f"img_told{time.time_ns():x}")
        options = {"base_image": BASE, "network": "restricted"} | options
        host.start_build(StartBuild(made[-1], recipe=recipe, **options))  # type: ignore[arg-type]
        return list(host.build_events(made[-1]))

    yield run
    for name in made:
        with suppress(HostError):
            host.cancel_build(name)


def test_what_is_baked_in_is_there_in_steps_sandboxes_and_snapshots(
    build: Build, host: HostClient, new_sandbox: NewSandbox, agent: Agent
) -> None:
    events = build(
        "mkdir -p /opt/x/bin && printf '#!/bin/sh\\necho tool $A' > /opt/x/bin/tool",
        "chmod +x /opt/x/bin/tool && tool > /root/said",
        "echo 'APP_HOME=/opt/app' >> /etc/environment; echo 'A=file' >> /etc/environment",
        "echo $APP_HOME $A >> /root/said",
        env={"PATH": "/opt/x/bin:$PATH", "A": "template"},
    )
    published = one(events, "published")
    image = str(published["image"])
    shown = 'cat /root/said; tool; echo "[$APP_HOME] [$B]"; command -v ls'
    expected = b"tool template\n/opt/app template\ntool %s\n[/opt/app] [%s]\n/usr/bin/ls\n"
    box = new_sandbox(image=image, env={"B": "sandbox"})
    assert host.exec(box.id, Exec(shown)).stdout == expected % (b"template", b"sandbox")
    assert host.exec(box.id, Exec(shown, env={"A": "a", "B": "b"})).stdout == expected % (
        b"a",
        b"b",
    )
    snapshot = f"snap_told{time.time_ns():x}"
    host.create_snapshot(snapshot, sandbox_id=box.id)
    try:
        copy = new_sandbox(image="", snapshot=snapshot, env={"A": "copy"})
        assert host.exec(copy.id, Exec(shown)).stdout == expected % (b"copy", b"")
        agent.kill()
        agent.start()
        assert host.exec(box.id, Exec(shown)).stdout == expected % (b"template", b"sandbox")
        host.delete_sandbox(copy.id)
    finally:
        host.delete_snapshot(snapshot)
    # One that is built on it has what it has, and adds to it.
    events = build("tool", base_image=image, env={"PATH": "/opt/y:$PATH"})
    said = "".join(str(event.data["text"]) for event in events if event.kind == "output")
    assert said == "tool template\n"
    above = new_sandbox(image=str(one(events, "published")["image"]))
    assert host.exec(above.id, Exec("echo $PATH $APP_HOME")).stdout.startswith(
        b"/opt/y:/opt/x/bin:/usr/"
    )


def one(events: list[BuildEvent], kind: str) -> dict[str, object]:
    (found,) = [event.data for event in events if event.kind == kind]
    return found


# Refused by name before anybody resolves it: no packet leaves for it.
@pytest.mark.parametrize(
    ("recipe", "code", "step"),
    [
        (("true", "curl -sS https://nowhere.invalid/"), "network_policy_blocked", 2),
        (("curl -sS https://nowhere.invalid/; true", "false"), "step_failed", 2),
        (("exit 7",), "step_failed", 1),
        (("tail /dev/zero",), "out_of_memory", 1),
        (("head -c 200M /dev/zero > /root/fill",), "out_of_disk", 1),
        (("trap '' TERM; sleep 60",), "step_timeout", 1),
        (("sleep 1.5", "sleep 60"), "build_timeout", 2),
    ],
)
def test_each_way_to_fail_has_its_code(
    build: Build, recipe: tuple[str, ...], code: str, step: int
) -> None:
    limits = {"memory_mb": 256, "disk_mb": 64}
    times = {"step_timeout_seconds": 2.0, "build_timeout_seconds": 3.0}
    last = build(*recipe, **limits, **(times if "timeout" in code else {}))[-1]
    assert (last.kind, last.data["code"], last.data["step"]) == ("failed", code, step)


def test_what_each_phase_took_and_each_step_added(build: Build) -> None:
    events = build(
        "mkdir /srv/a && head -c 5M /dev/urandom > /srv/a/x && touch /srv/a/{1..9}",
        "rm -r /srv/a",
        "mkdir -p /var/lib/apt/lists && head -c 2M /dev/urandom > /var/lib/apt/lists/x",
    )
    finished = [event.data for event in events if event.kind == "step_finished"]
    assert 5 << 20 <= finished[0]["added_bytes"] < 6 << 20
    assert finished[0]["added_files"] >= 11
    assert finished[1]["added_bytes"] <= -5 << 20
    assert finished[1]["added_files"] <= -10
    removed = {item["what"]: item for item in one(events, "scrub")["removed"]}  # type: ignore[attr-defined]
    assert removed["apt package lists"]["files"] == 1
    assert 2 << 20 <= removed["apt package lists"]["bytes"] < 3 << 20
    published, boot = one(events, "published"), one(events, "boot")
    assert boot["duration_ms"] >= round(float(str(boot["boot_ms"])))  # type: ignore[operator]
    phases = [event.data.get("duration_ms", 0) for event in events]
    assert sum(phases) + published["publish_ms"] <= published["total_ms"] + len(phases)  # type: ignore[operator]


def test_the_same_recipe_makes_the_same_digest(build: Build) -> None:
    recipe = ("mkdir /srv/x && echo 1 > /srv/x/1 && rm /usr/bin/less", "chmod 700 /srv/x")
    first, second = (one(build(*recipe), "contents") for _ in range(2))
    other = one(build(*recipe, "chmod 755 /srv/x"), "contents")
    assert first["digest"] == second["digest"] != other["digest"]


def test_what_is_installed_is_what_dpkg_says(
    host: HostClient, build: Build, new_sandbox: NewSandbox
) -> None:
    events = build("true")
    contents = one(events, "contents")
    image = str(one(events, "published")["image"])
    assert host.image(image).digest == contents["digest"]
    sandbox = new_sandbox(image=image)
    said = host.exec(
        sandbox.id, Exec("dpkg-query -W -f '${Package} ${Version}\\n'")
    ).stdout.decode()
    expected = sorted(line.split() for line in said.splitlines())
    assert sorted(contents["packages"]["dpkg"]) == expected  # type: ignore[index]
    assert len(expected) > 80 and not contents["truncated"]


def test_how_much_deleting_an_image_gives_back(
    agent: Agent, host: HostClient, build: Build, new_sandbox: NewSandbox
) -> None:
    image = str(one(build("head -c 5M /dev/urandom > /srv/own"), "published")["image"])
    new_sandbox(image=image)
    usage = host.image_usage(image)
    assert usage.users == 1
    assert usage.reclaimable_bytes == usage.size_bytes - usage.shared_bytes
    # Its directories, 4 KiB each, are its own as well.
    assert 5 << 20 <= usage.reclaimable_bytes < 20 << 20
    assert usage.shared_bytes > 100 << 20
    with pytest.raises(NotFound):
        host.image_usage("img_none")
