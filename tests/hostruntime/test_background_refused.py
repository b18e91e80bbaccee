"""What the network policy refused while a command ran in the background: looked up once."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from hostruntime.host.paths import Instance, StatePaths
from hostruntime.image.store import ImageStore
from hostruntime.sandbox.background import BackgroundCommands, Launch
from hostruntime.sandbox.manager import SandboxManager
from hostruntime.sandbox.record import Sandbox
from hostruntime.wire.commands import RefusedRequest
from hostruntime.wire.health import EgressDecision
from hostruntime.wire.sandboxes import CreateSandbox

SANDBOX, COMMAND = "sbx_1", "cmd_1"
LAUNCH = Launch(COMMAND, "fetch", ["true"], "/", {})


class Record:
    """The egress record of sandboxes with a network that is restricted, or not."""

    def __init__(self, *, restricted: bool = True) -> None:
        self.restricted = restricted
        self.looks = 0
        self.decisions: list[EgressDecision] = []

    def refuse(self, host: str, seconds_ago: float) -> None:
        at = time.time() - seconds_ago
        self.decisions.append(EgressDecision(at, SANDBOX, host, 443, "refused", "not_listed"))

    def read(self, owner: str, since: float) -> Sequence[EgressDecision]:
        self.looks += 1
        return [one for one in self.decisions if one.owner == owner and one.at >= since]


@pytest.fixture
def record() -> Record:
    return Record()


@pytest.fixture
def commands(tmp_path: Path, record: Record) -> BackgroundCommands:
    paths = StatePaths(tmp_path / "state").ensure()
    (paths.sandboxes / SANDBOX).mkdir()
    disk = tmp_path / "disk"
    disk.mkdir()
    containers = SimpleNamespace(
        disks=SimpleNamespace(path=lambda _: disk), name_of=lambda _: "ork15-test-refused"
    )
    return BackgroundCommands(
        paths,
        containers,  # type: ignore[arg-type]
        lambda _: record.read if record.restricted else None,
    )


def test_only_a_restricted_network_has_a_record_to_look_at(tmp_path: Path, record: Record) -> None:
    paths = StatePaths(tmp_path / "state").ensure()
    containers: Any = SimpleNamespace(on_exit=[], instance=Instance(7), launchers=None)
    sandboxes = SandboxManager(paths, containers, ImageStore(paths), refusals=record.read)
    for network in ("restricted", "off", "open"):
        request = CreateSandbox(network, "img_1", cpu=1, memory_mb=512, network=network)
        sandboxes._sandboxes[network] = Sandbox(request, "running", "img_1", "/nowhere", None)
    looks = {name: sandboxes.background.refusals_of(name) for name in sandboxes.live()}
    assert looks == {"restricted": record.read, "off": None, "open": None}
    assert sandboxes.background.refusals_of("gone") is None


def ended(commands: BackgroundCommands, code: int, seconds_ago: float) -> None:
    """A command has begun ten seconds ago, and ended."""
    descriptors: list[int] = []
    commands._create_files(SANDBOX, LAUNCH, descriptors)
    directory = commands._directory(SANDBOX, COMMAND)
    begun = json.loads((directory / "command.json").read_text())
    begun["started_at"] = time.time() - 10
    (directory / "command.json").write_text(json.dumps(begun))
    status = {"pid": 3, "status": code << 8, "duration_ms": 1}
    (directory / "status").write_text(json.dumps(status))
    at = time.time() - seconds_ago
    os.utime(directory / "status", (at, at))
    for descriptor in descriptors:
        os.close(descriptor)


def test_it_names_what_was_refused_between_its_start_and_its_end(
    commands: BackgroundCommands, record: Record
) -> None:
    for host, seconds_ago in (("before", 11), ("mine", 8), ("mine", 7), ("after", 3)):
        record.refuse(host, seconds_ago)
    ended(commands, code=7, seconds_ago=5)
    mine = (RefusedRequest("mine", 443, "not_listed"),)
    assert commands.get(SANDBOX, COMMAND).refused == mine
    # As the record forgets, and those who wait ask again and again.
    record.decisions.clear()
    assert [each.refused for each in commands.list_all(SANDBOX)] == [mine]
    assert record.looks == 1


def test_what_could_not_be_read_is_looked_up_again(
    commands: BackgroundCommands, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    record.refuse("mine", 8)
    ended(commands, code=7, seconds_ago=5)
    with monkeypatch.context() as patch:
        patch.setattr(record, "read", MagicMock(side_effect=OSError(24, "Too many open files")))
        assert commands.get(SANDBOX, COMMAND).refused == ()
    mine = (RefusedRequest("mine", 443, "not_listed"),)
    assert commands.get(SANDBOX, COMMAND).refused == mine


@pytest.mark.parametrize(("code", "restricted"), [(0, True), (7, False)])
def test_others_cost_no_look_and_leave_nothing(
    commands: BackgroundCommands, record: Record, code: int, *, restricted: bool
) -> None:
    record.restricted = restricted
    record.refuse("mine", 8)
    ended(commands, code, seconds_ago=5)
    assert commands.get(SANDBOX, COMMAND).refused == ()
    assert record.looks == 0
    assert not (commands._directory(SANDBOX, COMMAND) / "refused.json").exists()
