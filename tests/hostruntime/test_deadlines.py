"""Deadlines are enforced whatever goes wrong in one round of looking at them."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hostruntime.host.paths import Instance, StatePaths
from hostruntime.image.store import ImageStore
from hostruntime.sandbox import manager
from hostruntime.sandbox.manager import SandboxManager
from hostruntime.sandbox.record import Sandbox
from hostruntime.wire.sandboxes import CreateSandbox


class Containers:
    """Stops what it is told to, but fails by a defect as often as it is told."""

    def __init__(self) -> None:
        self.on_exit: list[Any] = []
        self.stopped: list[str] = []
        self.paused: list[str] = []
        self.defects: dict[str, int] = {}
        self.unfreezable: set[str] = set()

    async def pause(self, owner: str) -> None:
        if owner in self.unfreezable:
            await asyncio.Event().wait()
        self.paused.append(owner)

    async def stop(self, owner: str) -> None:
        await asyncio.sleep(0)
        if self.defects.get(owner, 0) > 0:
            self.defects[owner] -= 1
            raise ZeroDivisionError("a defect")
        self.stopped.append(owner)

    instance = Instance(7)

    def name_of(self, owner: str) -> str:
        return f"ork15-test-{owner}"

    @property
    def launchers(self) -> Any:
        return SimpleNamespace()


@pytest.fixture
def containers() -> Containers:
    return Containers()


@pytest.fixture
def sandboxes(
    tmp_path: Path, containers: Containers, monkeypatch: pytest.MonkeyPatch
) -> SandboxManager:
    monkeypatch.setattr(manager, "SWEEP_SECONDS", 0.01)
    paths = StatePaths(tmp_path / "state").ensure()
    return SandboxManager(paths, containers, ImageStore(paths))  # type: ignore[arg-type]


def run(sandboxes: SandboxManager, name: str, deadline: float | None) -> None:
    """Have one that runs until then."""
    (sandboxes.paths.sandboxes / name).mkdir()
    request = CreateSandbox(name, "img_1", cpu=1, memory_mb=512, deadline=deadline)
    sandbox = Sandbox(request, "running", "img_1", "/nowhere", None).with_deadline(deadline)
    sandboxes._sandboxes[name] = sandbox


async def ended(sandboxes: SandboxManager, *names: str) -> None:
    async with asyncio.timeout(20):
        while not all(sandboxes.get(name).state == "gone" for name in names):
            await asyncio.sleep(0.01)


async def test_a_round_that_fails_by_a_defect_is_not_the_last(
    sandboxes: SandboxManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it is, and wherever: here it is the list of all of them."""
    whole, failures = SandboxManager.list, 3

    def list_or_fail(self: SandboxManager) -> list[Sandbox]:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise ZeroDivisionError("a defect")
        return whole(self)

    monkeypatch.setattr(SandboxManager, "list", list_or_fail)
    run(sandboxes, "sbx_over", time.time() - 1)
    sandboxes.start_sweeping()
    await ended(sandboxes, "sbx_over")
    await sandboxes.close()
    assert failures < 0
    assert sandboxes.get("sbx_over").reason == "expired"


async def test_one_that_cannot_be_ended_keeps_no_other_from_its_end(
    sandboxes: SandboxManager, containers: Containers
) -> None:
    containers.defects = {"sbx_a": 10**9, "sbx_b": 3}
    for name in ("sbx_a", "sbx_b", "sbx_c"):
        run(sandboxes, name, time.time() - 1)
    run(sandboxes, "sbx_goes_on", time.time() + 600)
    sandboxes.start_sweeping()
    await ended(sandboxes, "sbx_b", "sbx_c")
    containers.defects["sbx_a"] = 0
    await ended(sandboxes, "sbx_a")
    await sandboxes.close()
    assert sorted(containers.stopped) == ["sbx_a", "sbx_b", "sbx_c"]
    assert sandboxes.get("sbx_goes_on").state == "running"


async def test_those_that_do_not_freeze_delay_nobody_elses_end(
    sandboxes: SandboxManager, containers: Containers
) -> None:
    containers.unfreezable = {f"sbx_a{number}" for number in range(100)}
    for name in sorted(containers.unfreezable):
        run(sandboxes, name, time.time() - 1)
        running = sandboxes.get(name)
        request = replace(running.request, pause_seconds=600)
        sandboxes._sandboxes[name] = replace(running, request=request)
    run(sandboxes, "sbx_b", time.time() - 1)
    sandboxes.start_sweeping()
    await ended(sandboxes, "sbx_b")
    await sandboxes.close()
    assert containers.stopped == ["sbx_b"]
    assert sandboxes._expiring == {}


async def test_what_is_used_is_read_on_after_a_defect(
    sandboxes: SandboxManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hostruntime.sandbox.usage.SAMPLE_SECONDS", 0.01)
    read, third = 0, asyncio.Event()

    def readings(_: object) -> dict[str, Any]:
        nonlocal read
        read += 1
        if read == 3:
            loop.call_soon_threadsafe(third.set)
        raise ZeroDivisionError("a defect")

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(sandboxes.usage, "_readings", readings)
    sandboxes.start_sweeping()
    await asyncio.wait_for(third.wait(), 20)
    await sandboxes.close()


async def test_one_that_is_to_be_paused_is_not_lost_to_a_full_disk_of_the_host(
    sandboxes: SandboxManager, containers: Containers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run(sandboxes, "sbx_kept", time.time() - 1)
    running = sandboxes.get("sbx_kept")
    request = replace(running.request, pause_seconds=600)
    sandboxes._sandboxes["sbx_kept"] = replace(running, request=request)
    monkeypatch.setattr(manager, "write_json", fail)
    for _ in range(2):
        await sandboxes._sweep()
        await asyncio.gather(*sandboxes._expiring.values())
    found = sandboxes.get("sbx_kept")
    assert (found.state, found.paused) == ("running", True)
    assert (containers.paused, containers.stopped) == (["sbx_kept"], [])


@pytest.mark.parametrize("failing", ["_save", "volumes.keep"])
async def test_one_that_cannot_be_recorded_is_not_left_running(
    sandboxes: SandboxManager,
    containers: Containers,
    monkeypatch: pytest.MonkeyPatch,
    failing: str,
) -> None:
    """The disk is full: who asked for it is told so, and would find it running, but unmetered, and
    with a volume that is discarded at its end."""

    async def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def started(*_: object) -> Any:
        return None

    request = CreateSandbox("sbx_new", "img_1", cpu=1, memory_mb=512)
    sandbox = Sandbox(request, "starting", "img_1", "/nowhere", None)
    monkeypatch.setattr(sandboxes, "_describe", lambda *_: sandbox)
    monkeypatch.setattr(sandboxes, "_spec", lambda *_: None)
    monkeypatch.setattr(sandboxes, "_start", started)
    monkeypatch.setattr(manager, "as_running", lambda *_: replace(sandbox, state="running"))
    owner = sandboxes.volumes if failing == "volumes.keep" else sandboxes
    monkeypatch.setattr(owner, failing.rpartition(".")[2], fail)
    (sandboxes.paths.sandboxes / "sbx_new").mkdir()
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        await sandboxes._start_sandbox(request, None, None)  # type: ignore[arg-type]
    assert containers.stopped == ["sbx_new"]
    assert sandboxes.list() == []
    assert not (sandboxes.paths.sandboxes / "sbx_new").exists()
