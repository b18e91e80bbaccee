"""No status is wrong for long, whoever was killed while it was on its way to the next one."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from hostruntime.container.cgroups import cgroup_layout
from hostruntime.errors import HostError
from hostruntime.host.patience import scaled
from orkestr_console.runner.programs import agent_is_ready, web_is_ready
from tests.clients.making import Sandboxes, Templates
from tests.host.agent import container_of
from tests.stack import Stack, wait_for

# What issue 14 asks for, counted from when what was killed is back.
SETTLED_SECONDS = scaled(10.0)


def read(stack: Stack, path: str) -> dict[str, Any]:
    """One thing as the API shows it; nothing while the console does not answer."""
    try:
        with stack.client() as client:
            answer = client.get(f"/v1/{path}", timeout=10)
            found: dict[str, Any] = answer.json() if answer.is_success else {}
            return found
    except httpx.HTTPError:
        return {}


def status(stack: Stack, path: str) -> str:
    return str(read(stack, path).get("status", ""))


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process that does nothing for as long as this lasts."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


class Cut:
    """Calls whose answer never comes, as somebody is killed meanwhile."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._threads: list[threading.Thread] = []

    def post(self, path: str, **body: Any) -> None:
        thread = threading.Thread(target=self._post, args=(path, body))
        self._threads.append(thread)
        thread.start()

    def _post(self, path: str, body: dict[str, Any]) -> None:
        try:
            with self._stack.client() as client:
                client.post(f"/v1/{path}", json=body)
        except httpx.HTTPError:
            return

    def end(self) -> None:
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive()


class OnTheirWay:
    """A sandbox that starts, one that is paused, one resumed, and one of which a copy is taken."""

    def __init__(self, stack: Stack, sandboxes: Sandboxes) -> None:
        self._stack = stack
        self._calls = Cut(stack)
        self.pausing, self.resuming, self.copied = (sandboxes.boot("debian-12") for _ in range(3))
        self.resuming.pause()
        self.starting = self.snapshot = ""

    def begin(self) -> None:
        """Ask for all four, of an agent that does not answer; return when the rows say so."""
        began, kept = self._ids("sandboxes"), self._ids("sandboxes/snapshots")
        self._calls.post("sandboxes", template="debian-12", timeout_seconds=300)
        self._calls.post(f"sandboxes/{self.pausing.id}/pause")
        self._calls.post(f"sandboxes/{self.resuming.id}/resume")
        self._calls.post(f"sandboxes/{self.copied.id}/snapshots", name="cut off")
        wait_for(lambda: self._ids("sandboxes") > began, 30, self._stack.explain)
        (self.starting,) = self._ids("sandboxes") - began
        wait_for(lambda: self._ids("sandboxes/snapshots") > kept, 30, self._stack.explain)
        (self.snapshot,) = self._ids("sandboxes/snapshots") - kept
        expected = ["starting", "pausing", "resuming", "capturing"]
        wait_for(lambda: self.statuses() == expected, 30, self._stack.explain)

    def statuses(self) -> list[str]:
        boxes = (self.starting, self.pausing.id, self.resuming.id)
        paths = [*(f"sandboxes/{box}" for box in boxes), f"sandboxes/snapshots/{self.snapshot}"]
        return [status(self._stack, path) for path in paths]

    def _ids(self, what: str) -> set[str]:
        return {
            str(row["id"])
            for row in read(self._stack, f"{what}?limit=200").get(what.rpartition("/")[2], [])
        }

    def end(self) -> None:
        self._calls.end()
        with self._stack.client() as client:
            client.delete(f"/v1/sandboxes/snapshots/{self.snapshot}")

    def are_right(self) -> bool:
        """Whether each says what the host has."""
        starting, pausing, resuming, capturing = self.statuses()
        return (
            starting == "failed"
            and self.on_host(self.starting) == "nothing"
            and pausing == self.on_host(self.pausing.id)
            and resuming == self.on_host(self.resuming.id)
            and capturing == self.snapshot_on_host()
        )

    def on_host(self, sandbox: str) -> str:
        with self._stack.host() as host:
            try:
                info = host.sandbox(sandbox)
            except HostError:
                return "nothing"
        return "paused" if info.paused else info.state

    def snapshot_on_host(self) -> str:
        with self._stack.host() as host:
            there = {one.id for one in host.snapshots()}
        return "ready" if self.snapshot in there else "failed"


@pytest.fixture
def way(stack: Stack, sandboxes: Sandboxes) -> Iterator[OnTheirWay]:
    way = OnTheirWay(stack, sandboxes)
    yield way
    way.end()


def come_back(stack: Stack, program: str, old: int) -> None:
    """Wait until a program that was killed is there again, and answers."""
    stack.wait_until_restarted(program, old, 60)
    answers: dict[str, Callable[[], bool]] = {
        "web": lambda: web_is_ready(stack.layout),
        "agent": lambda: agent_is_ready(stack.layout.host_socket),
    }
    if program in answers:
        wait_for(answers[program], 60, stack.explain)


@pytest.mark.parametrize("killed", ["web", "agent"])
def test_what_is_on_its_way_is_settled_when_who_drove_it_is_back(
    stack: Stack, way: OnTheirWay, killed: str
) -> None:
    agent, old = stack.pid("agent"), stack.pid(killed)
    with stopped(agent):
        way.begin()
        stack.kill(killed)
    come_back(stack, killed, old)
    wait_for(way.are_right, SETTLED_SECONDS, lambda: f"{way.statuses()}\n{stack.explain()}")


def init_of(stack: Stack, sandbox: str) -> int:
    """The host's pid of a sandbox's init."""
    name = container_of(stack.layout.state_dir, sandbox)
    group = cgroup_layout().container(name).unified
    return int((group / "cgroup.procs").read_text().split()[0])


@pytest.mark.parametrize("before", [None, "agent", "postgres", "worker"])
def test_a_sandbox_whose_init_died_is_said_to_have_ended(
    stack: Stack, sandboxes: Sandboxes, before: str | None
) -> None:
    """Also when who was to say or to hear it was killed a moment before."""
    sandbox = sandboxes.boot("debian-12")
    init = init_of(stack, sandbox.id)
    old = stack.pid(before) if before else 0
    if before:
        stack.kill(before)
    os.kill(init, signal.SIGKILL)
    if before:
        come_back(stack, before, old)
    path = f"sandboxes/{sandbox.id}"
    wait_for(lambda: status(stack, path) == "failed", SETTLED_SECONDS, stack.explain)


def builds(stack: Stack) -> list[Path]:
    """The records of the host's builds."""
    return list((stack.layout.state_dir / "builds").glob("*/build.json"))


def is_under_way(record: Path) -> bool:
    return bool(json.loads(record.read_text())["state"] == "running")


def test_a_template_published_while_no_worker_ran_is_ready_soon(
    stack: Stack, templates: Templates
) -> None:
    template = templates.create("debian-12", "sleep 2")
    # Its worker has it: one whose worker was killed before still waits for its turn.
    wait_for(lambda: any(map(is_under_way, builds(stack))), 30, stack.explain)
    worker = stack.pid("worker")
    stack.kill("worker")
    come_back(stack, "worker", worker)
    wait_for(lambda: not any(map(is_under_way, builds(stack))), 60, stack.explain)
    path = f"templates/{template}"
    wait_for(lambda: status(stack, path) == "ready", SETTLED_SECONDS, stack.explain)
