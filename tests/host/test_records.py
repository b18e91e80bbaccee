"""Records on disk that cannot be believed: one is set aside, by name, and the rest serves."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hostruntime.container.cgroups import cgroup_layout
from hostruntime.errors import HostError, NotFound
from hostruntime.host.rundir import RUN_ROOT
from hostruntime.wire.commands import Exec
from hostruntime.wire.sandboxes import CreateSandbox
from tests.host.agent import Agent, eventually, groups_named, mounts_below
from tests.host.small import IMAGE, a_small_agent, publish

pytestmark = pytest.mark.host

type Damage = Callable[[Path], None]


def _written(data: bytes) -> Damage:
    def write(path: Path) -> None:
        path.write_bytes(data)

    return write


def _half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _without_a_key(path: Path) -> None:
    record = json.loads(path.read_bytes())
    # The second: the id is the first of most, and its absence is another matter.
    del record[list(record)[1]]
    path.write_text(json.dumps(record))


def _of_other_types(path: Path) -> None:
    record = json.loads(path.read_bytes())
    path.write_text(json.dumps({key: [str(value)] for key, value in record.items()}))


def _no_numbers(path: Path) -> None:
    record: dict[str, Any] = json.loads(path.read_bytes())
    odd = {k: float("nan") for k, v in record.items() if isinstance(v, float)}
    path.write_text(json.dumps(record | odd or {"id": 1}))


def _a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _a_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _anothers(path: Path) -> None:
    record = json.loads(path.read_bytes())
    if "request" in record and record["request"] and "id" in record["request"]:
        record["request"]["id"] = "somebody_else"
    path.write_text(json.dumps(record | {"id": "somebody_else"}))


DAMAGES: dict[str, Damage] = {
    "empty object": _written(b"{}"),
    "nothing": _written(b""),
    "binary": _written(bytes(range(256))),
    "a list": _written(b"[1, 2]"),
    "truncated": _half,
    "a key lost": _without_a_key,
    "other types": _of_other_types,
    "no numbers": _no_numbers,
    "a directory": _a_directory,
    "a FIFO": _a_fifo,
    "another's": _anothers,
}
SNAPSHOT = {
    "id": "snap_bad",
    "sandbox": "sbx_source",
    "image_id": IMAGE,
    "disk_mb": 64,
    "size_bytes": 4096,
    "created_at": 1_700_000_000.5,
    "frozen_ms": 1.5,
}
MANIFEST = {
    "id": "img_bad",
    "kind": "template",
    "base": None,
    "created_at": 1_700_000_000.5,
    "size_bytes": 1,
    "file_count": 1,
    "shared_bytes": 0,
}
BUILD = {"id": "img_bad", "state": "published", "created_at": 1_700_000_000.5, "request": None}
METER = {"id": "sbx_bad", "read_at": 1.5, "cpu_us": 1, "ended_at": 1_900_000_000.5}


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    with a_small_agent(tmp_path / "state") as agent:
        yield agent


def a_record(directory: Path, name: str, record: dict[str, Any], *besides: str) -> Path:
    """A directory with a good record of the name of the directory in it."""
    directory.mkdir()
    for other in besides:
        (directory / other).mkdir() if other == "tree" else (directory / other).touch()
    (directory / name).write_text(json.dumps(record | {"id": directory.name}))
    return directory / name


def an_image(state: Path, name: str) -> Path:
    return a_record(state / "images" / name, "image.json", MANIFEST, "tree")


def a_snapshot(state: Path, name: str) -> Path:
    return a_record(state / "snapshots" / name, "snapshot.json", SNAPSHOT, "disk.ext4")


def a_build(state: Path, name: str) -> Path:
    return a_record(state / "builds" / name, "build.json", BUILD)


def a_meter(state: Path, name: str) -> Path:
    path = state / f"usage/{name}.json"
    path.write_text(json.dumps(METER | {"id": name}))
    return path


def left_of(agent: Agent, sandbox: str) -> list[str]:
    """What the machine still has of a sandbox."""
    run = RUN_ROOT / agent.prefix.removeprefix("ork").removesuffix("-")
    slots = [path for path in (run / "slots").iterdir() if sandbox in path.read_text()]
    return [
        *groups_named(f"{agent.prefix}{sandbox}"),
        *(mount for mount in mounts_below(run) if sandbox in mount),
        *map(str, (agent.state / "disks").glob(f"{sandbox}*")),
        *map(str, slots),
    ]


def bad_records(state: Path) -> dict[str, Path]:
    """One of every kind for every way to be bad, by what it is called once it is set aside."""
    found: dict[str, Path] = {}
    for number, damage in enumerate(DAMAGES.values()):
        made = {
            f"image.img_bad{number}": an_image(state, f"img_bad{number}"),
            f"snapshot.snap_bad{number}": a_snapshot(state, f"snap_bad{number}"),
            f"build.img_bad{number}": a_build(state, f"img_bad{number}"),
            f"usage.sbx_used{number}.json": a_meter(state, f"sbx_used{number}"),
            f"sandbox.sbx_bad{number}": state / f"sandboxes/sbx_bad{number}/sandbox.json",
        }
        for path in made.values():
            damage(path)
        found |= made
    return found


def test_bad_records_are_set_aside_and_the_rest_serves(agent: Agent) -> None:
    state, host = agent.state, agent.client
    bad = [f"sbx_bad{number}" for number in range(len(DAMAGES))]
    for name in (*bad, "sbx_good"):
        host.create_sandbox(
            CreateSandbox(name, image=IMAGE, cpu=1, memory_mb=128, network="restricted")
        )
    agent.kill()
    records = bad_records(state)
    for good in (an_image(state, "img_good"), a_snapshot(state, "snap_good")):
        assert good.exists()
    agent.start()
    held = {one.key: one.reason for one in host.quarantine()}
    assert held == dict.fromkeys(records, "damaged")
    assert [path for path in map(str, records.values()) if path not in agent.log()] == []
    assert {image.id for image in host.images()} == {IMAGE, "img_good"}
    assert [one.id for one in host.snapshots()] == ["snap_good"]
    assert [one.id for one in host.sandboxes()] == ["sbx_good"]
    # Nothing of theirs goes on running, and nothing that they had stays taken.
    assert [left for name in bad for left in left_of(agent, name)] == []
    # One that was running goes on, and new ones start.
    result = host.exec("sbx_good", Exec(["/usr/bin/python3", "-c", "print('runs')"], cwd="/"))
    assert result.stdout == b"runs\n"
    host.create_sandbox(CreateSandbox("sbx_new", image=IMAGE, cpu=1, memory_mb=128))
    with pytest.raises(NotFound):
        host.build("img_bad0")


def test_a_record_that_goes_bad_while_the_agent_runs_costs_nobody_else(agent: Agent) -> None:
    host = agent.client
    for number, damage in enumerate(DAMAGES.values()):
        damage(an_image(agent.state, f"img_bad{number}"))
    for number in range(len(DAMAGES)):
        with pytest.raises(HostError, match="cannot be believed") as refused:
            host.create_sandbox(
                CreateSandbox("sbx_one", image=f"img_bad{number}", cpu=1, memory_mb=128)
            )
        assert refused.value.status == 500
    assert [image.id for image in host.images()] == [IMAGE]
    assert host.health().counts["images"] == 1
    host.create_sandbox(CreateSandbox("sbx_two", image=IMAGE, cpu=1, memory_mb=128))
    assert [one.id for one in host.sandboxes()] == ["sbx_two"]
    assert left_of(agent, "sbx_one") == []


def test_what_was_set_aside_can_be_mended_and_put_back(agent: Agent) -> None:
    host = agent.client
    publish(agent.state, "img_bad")
    record = agent.state / "images/img_bad/image.json"
    whole = record.read_bytes()
    agent.stop()
    record.write_bytes(b"{}")
    agent.start()
    with pytest.raises(HostError, match="still damaged"):
        host.restore_quarantined("image.img_bad")
    (agent.state / "quarantine/image.img_bad/content/image.json").write_bytes(whole)
    host.restore_quarantined("image.img_bad")
    assert host.quarantine() == []
    host.create_sandbox(CreateSandbox("sbx_back", image="img_bad", cpu=1, memory_mb=128))


def test_an_image_that_is_gone_from_disk_is_not_found(agent: Agent) -> None:
    shutil.rmtree(an_image(agent.state, "img_bad").parent)
    with pytest.raises(NotFound):
        agent.client.create_sandbox(CreateSandbox("sbx_one", image="img_bad", cpu=1, memory_mb=128))
    shutil.rmtree(agent.state / f"images/{IMAGE}/tree")
    assert agent.client.images() == []
    agent.stop()
    agent.start()
    assert [held.key for held in agent.client.quarantine()] == [f"image.{IMAGE}"]
    publish(agent.state, "img_other")
    agent.client.create_sandbox(CreateSandbox("sbx_two", image="img_other", cpu=1, memory_mb=128))


@pytest.mark.parametrize("name", ["instance.json", "installation.json"])
def test_the_states_own_records_may_be_bad_too(agent: Agent, name: str) -> None:
    host = agent.client
    host.create_sandbox(CreateSandbox("sbx_good", image=IMAGE, cpu=1, memory_mb=128))
    prefix = agent.prefix
    for damage in (_written(b"{}"), _written(b"\xff\x00"), _a_directory):
        agent.kill()
        path = agent.state / name
        if path.is_dir():
            path.rmdir()
        path.touch()
        damage(path)
        if name == "instance.json" and path.is_dir():
            path.rmdir()  # There is no other place for the number.
        agent.start()
        assert agent.prefix == prefix
        assert [one.state for one in host.sandboxes()] == ["running"]
    group = cgroup_layout().container(f"{prefix}sbx_good").unified
    for _ in eventually():
        if (group / "cgroup.procs").read_text():
            break
