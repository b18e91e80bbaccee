"""Layers on real disks: a build that begins with one cannot tell that its steps were not run."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from hostruntime.build.layers import DISK_FILE, TMPFS_FILE
from hostruntime.errors import HostError
from hostruntime.wire.builds import BuildEvent, Cache, StartBuild
from hostruntime.wire.commands import Exec
from tests.host.agent import Agent, eventually
from tests.host.client import HostClient
from tests.host.conftest import BASE, NewSandbox

pytestmark = pytest.mark.host

Build = Callable[..., tuple[str, list[BuildEvent]]]

# Each step says in a file that it was run, and leaves something that is easily lost on the way.
COUNT = "echo run >> /root/runs"
STEPS = (
    f"""{COUNT}; mkdir -p /srv/a/b && cd /srv && printf data > a/file
ln a/file a/b/again; ln -s ../nowhere a/link; mkfifo -m 640 a/pipe
install -m 4755 -o 1000 -g 1001 /bin/true suid; chown 7:8 a; chmod 2750 a
truncate -s 5G hole; printf end >> hole; touch -d @1234567890.5 a/old""",
    f"""{COUNT}; rm /usr/bin/less; rm -r /usr/share/doc; mkdir /usr/share/doc
mv /usr/share/bash-completion /usr/share/moved; chmod 600 /etc/issue
echo changed >> /etc/motd; printf x > "$(printf '/srv/odd\\nname \\377')" """,
    f"""{COUNT}; cd /tmp && mkdir -p d/e && echo tmp > d/e/f && ln d/e/f again && mkfifo pipe
chown 3:4 d; chmod 1711 d; ln -s d link; printf x > 'sp ace'; touch -d @1000000000 d/e/old
echo work > /workspace/w; echo shm > /dev/shm/s; chmod 700 /workspace
(setsid sleep 1000 &); sleep 0.1""",
)
LOOK = r"""
cat /root/runs | wc -l
for d in /srv /tmp /workspace /dev/shm; do
  find $d ! -type d -printf '%p %y %m %U %G %n %s %l\n' | sort
done
# How many links a file of the base has says how many images share it at the time.
find /usr/share ! -type d -printf '%p %y %m %U %G %s %l\n' | sort
find /srv /tmp /workspace /dev/shm /usr/share -type d -printf '%p %y %m %U %G\n' | sort
find /srv /tmp/d -newermt @0 -type f -printf '%p %T@\n' | grep old
find /usr/bin /etc -printf '%p %y %m %U %G %l\n' | sort
cat /etc/motd /srv/a/file /tmp/d/e/f /workspace/w /dev/shm/s; tail -c 3 /srv/hole
[ /srv/a/file -ef /srv/a/b/again ] && [ /tmp/d/e/f -ef /tmp/again ] && echo linked
pgrep sleep || echo none
"""


@pytest.fixture
def scope(agent: Agent) -> Iterator[str]:
    name = f"team_{time.time_ns():x}"
    yield name
    shutil.rmtree(agent.state / "layers" / name, ignore_errors=True)


@pytest.fixture
def build(host: HostClient, scope: str) -> Iterator[Build]:
    """Runs a build that reuses to its end; what it published is deleted when the test ends."""
    made: list[str] = []

    def run(*recipe: str, reuse: bool = True, **options: Any) -> tuple[str, list[BuildEvent]]:
        name = f"img_layer{time.time_ns():x}"
        made.append(name)
        settings: dict[str, Any] = {
            "base_image": BASE,
            "network": "restricted",
            "disk_mb": 512,
            "cache": Cache(scope, reuse),
        } | options
        host.start_build(StartBuild(name, recipe=recipe, **settings))
        return name, list(host.build_events(name))

    yield run
    for name in made:
        with suppress(HostError):
            host.cancel_build(name)


def cached(events: list[BuildEvent]) -> list[int]:
    return [event.data["step"] for event in events if event.kind == "step_cached"]


def output(events: list[BuildEvent], step: int) -> str:
    texts = [e.data["text"] for e in events if e.kind == "output" and e.data["step"] == step]
    return "".join(texts)


def layers_in(agent: Agent, scope: str) -> list[Path]:
    return sorted((agent.state / "layers" / scope).glob("*"))


def test_nothing_tells_a_reused_step_from_one_that_was_run(build: Build) -> None:
    _, plain = build(*STEPS, LOOK, "false", cache=None)
    build("echo other > /srv/other", cache=None)
    failed, first = build(*STEPS, "false")
    assert (cached(first), first[-1].data["code"]) == ([], "step_failed")
    _, second = build(*STEPS, LOOK, "false")
    assert cached(second) == [1, 2, 3]
    seen = next(event.data for event in second if event.kind == "step_cached")
    assert (seen["build"], seen["command"]) == (failed, STEPS[0])
    assert output(second, 4) == output(plain, 4)
    assert output(second, 4).splitlines()[0] == "3"
    assert "linked\nnone" in output(second, 4)
    # Of this one the last layer is the third step's as well, taken from a disk that was put back.
    _, third = build(*STEPS, f"{LOOK} # again", "false")
    assert cached(third) == [1, 2, 3]
    assert output(third, 4) == output(plain, 4)


def test_the_image_is_the_same_as_well(build: Build) -> None:
    def digest(events: list[BuildEvent]) -> str:
        return next(str(event.data["digest"]) for event in events if event.kind == "contents")

    _, plain = build(*STEPS, "true", cache=None)
    build(*STEPS, "false")
    _, reused = build(*STEPS, "true")
    assert cached(reused) == [1, 2, 3]
    assert digest(reused) == digest(plain)


def test_what_a_reused_step_did_in_vain_is_told_at_that_step(build: Build) -> None:
    steps = (
        "echo one > /workspace/one; echo nameserver 192.0.2.1 > /etc/resolv.conf",
        "echo two > /workspace/two; echo gone > /tmp/gone",
        "rm /tmp/gone; echo own > /etc/hostname",
        "true",
    )

    def told(events: list[BuildEvent]) -> list[tuple[int, list[str]]]:
        found = [event.data for event in events if event.kind == "not_captured"]
        return sorted((one["step"], one["paths"]) for one in found)

    expected = [
        (1, ["/etc/resolv.conf"]),
        (1, ["/workspace/one"]),
        (2, ["/workspace/two"]),
        (3, ["/etc/hostname"]),
    ]
    _, plain = build(*steps, "true", cache=None)
    assert told(plain) == expected
    build(*steps, "false")
    # The second layer is taken from a disk that was put back.
    _, again = build(*steps, "echo new > /tmp/new", "false")
    assert cached(again) == [1, 2, 3, 4]
    _, reused = build(*steps, "echo new > /tmp/new", "true")
    assert cached(reused) == [1, 2, 3, 4, 5]
    assert told(reused) == [*expected, (5, ["/tmp/new"])]


def test_a_published_reuse_is_what_a_sandbox_sees(
    host: HostClient, build: Build, new_sandbox: NewSandbox
) -> None:
    build(*STEPS[:2], "false")
    name, events = build(*STEPS[:2], "echo new > /srv/new")
    assert (cached(events), events[-1].kind) == ([1, 2], "published")
    sandbox = new_sandbox(image=name)
    script = "cat /root/runs /srv/new; ls /usr/bin/less; stat -c %u:%g:%a /srv/a; ls /tmp"
    said = host.exec(sandbox.id, Exec(script))
    assert said.stdout.decode().splitlines() == ["run", "run", "new", "7:8:2750"]


@pytest.mark.parametrize(
    ("recipe", "options", "expected"),
    [
        (STEPS[:2], {}, [1, 2]),
        ((STEPS[0], "true", STEPS[1]), {}, [1]),
        (("true", *STEPS[:2]), {}, []),
        (STEPS[:2], {"reuse": False}, []),
        (STEPS[:2], {"network": "open"}, []),
        (STEPS[:2], {"disk_mb": 256}, []),
        (STEPS[:2], {"cache": Cache("team_other", reuse=True)}, []),
        (STEPS[:2], {"base_image": "python-3.12-bare"}, []),
    ],
)
def test_only_the_same_beginning_is_reused(
    bases: None,
    agent: Agent,
    build: Build,
    recipe: tuple[str, ...],
    options: dict[str, Any],
    expected: list[int],
) -> None:
    build(*STEPS[:2], "false")
    _, events = build(*recipe, "wc -l < /root/runs; false", **options)
    assert cached(events) == expected
    assert output(events, len(recipe) + 1).strip() == "2"
    shutil.rmtree(agent.state / "layers/team_other", ignore_errors=True)


def _break(path: Path, data: bytes) -> None:
    with path.open("r+b") as file:
        file.write(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda layer: (layer / DISK_FILE).unlink(),
        lambda layer: (layer / "layer.json").write_text("{"),
        lambda layer: _break(layer / DISK_FILE, b"\xff" * 8192),
        lambda layer: _break(layer / TMPFS_FILE, b"\xff" * 4096),
    ],
)
def test_what_is_damaged_is_built_anew(
    agent: Agent, build: Build, scope: str, damage: Callable[[Path], object]
) -> None:
    build(STEPS[2], "false")
    (layer,) = layers_in(agent, scope)
    damage(layer)
    _, events = build(STEPS[2], "wc -l < /root/runs; cat /tmp/d/e/f; false")
    assert (cached(events), output(events, 2)) == ([], "1\ntmp\n")


def test_a_saved_disk_is_a_clean_file_system(agent: Agent, build: Build, scope: str) -> None:
    build(*STEPS[:2], "false")
    build(*STEPS[:2], "rm -r /srv/a; head -c 5M /dev/urandom > /srv/x", "false")
    disks = [layer / DISK_FILE for layer in layers_in(agent, scope)]
    assert len(disks) == 3
    for disk in disks:
        checked = subprocess.run(["e2fsck", "-fn", str(disk)], capture_output=True, check=False)
        assert checked.returncode == 0, checked.stdout


def test_too_much_in_the_tmpfs_makes_no_layer(agent: Agent, build: Build, scope: str) -> None:
    _, events = build("head -c 300M /dev/urandom > /tmp/x", "ls -s --block-size=M /tmp", "false")
    assert "300M x" in output(events, 2)
    assert layers_in(agent, scope) == []


def test_a_tar_of_the_recipes_own_can_only_spoil_its_own_layer(
    agent: Agent, build: Build, scope: str
) -> None:
    stubborn = "#!/bin/sh\ntrap '' TERM\ncat > /dev/null\n(setsid sh -c 'sleep 600' &)\nexit 3\n"
    plant = f"cat > /usr/local/bin/tar <<'END'\n{stubborn}END\nchmod +x /usr/local/bin/tar"
    _, events = build(f"{plant}; echo x > /tmp/x", "cat /tmp/x", "false")
    assert output(events, 2) == "x\n"
    assert layers_in(agent, scope) == []
    build("echo x > /tmp/x", plant, "rm /tmp/x", "false")
    _, events = build("echo x > /tmp/x", plant, "rm /tmp/x", "pgrep sleep || echo none; false")
    assert output(events, 4) == "none\n"


def test_a_published_build_leaves_none(agent: Agent, build: Build, scope: str) -> None:
    build("true", "true", "true")
    assert layers_in(agent, scope) == []


def test_a_cancelled_build_leaves_its_own(
    agent: Agent, host: HostClient, build: Build, scope: str
) -> None:
    name = f"img_cancelled{time.time_ns():x}"
    cache = Cache(scope, reuse=True)
    recipe = (COUNT, "sleep 60")
    host.start_build(
        StartBuild(
            name, base_image=BASE, recipe=recipe, network="restricted", disk_mb=512, cache=cache
        )
    )
    for event in host.build_events(name):
        if event.kind == "step_started" and event.data["step"] == 2:
            break
    host.cancel_build(name)
    assert len(layers_in(agent, scope)) == 1
    _, events = build(COUNT, "wc -l < /root/runs; false")
    assert (cached(events), output(events, 2).strip()) == ([1], "1")


def test_a_killed_agent_leaves_nothing_half_made(
    agent: Agent, host: HostClient, build: Build, scope: str
) -> None:
    build(COUNT, "false")
    name = f"img_killed{time.time_ns():x}"
    cache = Cache(scope, reuse=True)
    recipe = (COUNT, "head -c 200M /dev/urandom > /srv/x; sleep 8", "sleep 60")
    host.start_build(
        StartBuild(
            name, base_image=BASE, recipe=recipe, network="restricted", disk_mb=512, cache=cache
        )
    )
    root = agent.state / "layers"
    for _ in eventually():
        if any(root.glob(".*/disk.ext4")):
            break
    agent.kill()
    assert any(root.glob(".*"))
    agent.start()
    assert not any(root.glob(".*"))
    assert len(layers_in(agent, scope)) == 1
    _, events = build(COUNT, "wc -l < /root/runs; false")
    assert (cached(events), output(events, 2).strip()) == ([1], "1")
