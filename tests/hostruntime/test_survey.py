"""What a build looks at inside its container after each step, at one entry into it."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

from hostruntime.container import inside_files
from tests.hostruntime.build_world import World
from tests.hostruntime.build_world import world as world


def surveyed(path: Path, *directories: Path) -> Any:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        arguments = {"path": str(path), "max_bytes": 4, "directories": list(map(str, directories))}
        inside_files._survey(theirs, arguments)
        (length,) = inside_files.LENGTH.unpack(ours.recv(inside_files.LENGTH.size))
        return json.loads(ours.recv(length))


def test_what_cannot_be_read_is_left_out(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(inside_files, "MAX_ENTRIES", 2)
    file, pipe, few, many = (tmp_path / name for name in ("file", "pipe", "few", "many"))
    file.write_bytes(b"\xff\x00456")
    os.mkfifo(pipe)
    for directory, names in ((few, ("a", "b")), (many, ("a", "b", "c"))):
        directory.mkdir()
        for name in names:
            (directory / name).touch()
    found = surveyed(file, few, many, tmp_path / "none", pipe)
    assert found["head"] == "ff003435"
    assert sorted(found["names"][0]) == ["a", "b"]
    assert found["names"][1:] == [None, None, None]
    assert [surveyed(path)["head"] for path in (pipe, few, tmp_path / "none")] == [None] * 3


async def test_a_build_looks_once_for_each_step(world: World) -> None:
    steps = ["write etc/environment A=1\n", "say a", "write workspace/x x", "say b"]
    events = await world.build(*steps)
    assert events[-1]["kind"] == "published"
    assert world.containers.surveys == len(steps)
    assert [step["A"] for step in world.containers.environments[1:]] == ["1"] * 3
    assert [event["step"] for event in events if event["kind"] == "not_captured"] == [3]
