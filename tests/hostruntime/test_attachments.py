"""How a launcher keeps its spawners, in all that can go wrong; no container is needed."""

from __future__ import annotations

import os
import select
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hostruntime.container import attaching
from hostruntime.container.attaching import NOT_STARTED, Attachments
from hostruntime.container.entering import Confinement, Doorway, EnteringFailed
from hostruntime.container.inside_spawner import (
    ACKNOWLEDGED,
    ENTERED,
    EXITED,
    REFUSED,
    REPLY,
    STARTED,
)
from hostruntime.container.spawner import Spawner
from hostruntime.host.kernel import SyscallFilter

_WITH_A_CHILD = "sleep 600 & echo $!; wait"


@dataclass
class World:
    """Attachments whose spawners are the test's: ``peers`` are the other ends of their sockets."""

    path: Path
    attachments: Attachments = field(init=False)
    sent: list[dict[str, Any]] = field(default_factory=list)
    peers: dict[str, socket.socket] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    otherwise: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        confinement = Confinement(SyscallFilter(b""), ())
        send: Callable[[Any], None] = self.sent.append
        self.attachments = Attachments(confinement, select.poll(), send)

    def fork(self, name: str, doorway: Doorway, _: Confinement) -> Spawner:
        """In place of Spawner.fork: a process that does nothing, with one child."""
        ours, self.peers[name] = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)  # noqa: FBT003 - positional-only
        process = subprocess.Popen(["sh", "-c", _WITH_A_CHILD], stdout=subprocess.PIPE)
        self.processes[name] = process
        return Spawner(name, process.pid, os.pidfd_open(process.pid), ours, doorway)

    def child(self, name: str) -> int:
        stdout = self.processes[name].stdout
        assert stdout is not None
        return int(stdout.readline())

    def says(self, name: str, kind: bytes, pid: int = 0, status: int = 0) -> None:
        """Have a spawner say something, and the launcher hear it."""
        self.peers[name].send(REPLY.pack(kind, pid, status))
        self.hears(name)

    def hears(self, name: str) -> None:
        spawner = self.attachments.spawners[name]
        assert self.attachments.handle(spawner.sock.fileno())

    def attach(self, name: str, request: int) -> dict[str, Any] | None:
        """A request for a command, with descriptors that become the launcher's."""
        group = self.path / f"exec-{request}"
        message = {"id": request, "call": "exec", "name": name, "group": str(group)}
        message |= {"argv": ["true"], "cwd": "/", "env": {}}
        fds = [os.open("/dev/null", os.O_RDWR) for _ in range(4)]
        try:
            return self.attachments.attach(message, fds)
        finally:
            for each in fds:
                os.close(each)

    def hand_over(self, name: str, request: int) -> None:
        """A command that its spawner has been given."""
        assert self.attach(name, request) is None
        if not self.attachments.spawners[name].entered:
            self.says(name, ENTERED)
        assert self.peers[name].recv(4096).startswith(b'{"argv"')


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    created = World(tmp_path)

    def move_in(_: Doorway, pid: int, group: Path | None) -> None:
        assert group is not None
        group.mkdir(exist_ok=True)
        for file in ("cgroup.procs", "cgroup.kill"):
            (group / file).write_text(f"{pid}\n" if file == "cgroup.procs" else "")

    def enter(_: Attachments, message: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        assert all(os.fstat(each) for each in fds)
        created.otherwise.append(message["id"])
        return {"pid": 1, "pid_inside": 1}

    def find(_: str) -> Doorway:
        return Doorway(os.open("/dev/null", os.O_RDONLY), ())

    monkeypatch.setattr(Spawner, "fork", created.fork)
    monkeypatch.setattr(Doorway, "find", find)
    monkeypatch.setattr(Doorway, "move_in", move_in)
    monkeypatch.setattr(Attachments, "_enter", enter)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - only the number
    yield created
    for name in list(created.attachments.doorways):
        created.attachments.forget(name)
    assert not created.attachments.spawners
    for process in created.processes.values():
        assert process.stdout is not None
        process.stdout.close()
        process.kill()
        process.wait()
    for peer in created.peers.values():
        peer.close()
    assert len(os.listdir("/proc/self/fd")) <= before  # noqa: PTH208


def age(world: World, name: str, seconds: float) -> None:
    """Make a spawner that much older, and have the launcher look after it."""
    world.attachments.spawners[name].since -= seconds
    world.attachments.next_check = 0
    world.attachments.check()


# Keeping ---------------------------------------------------------------------------------------


def test_one_that_nobody_uses_is_ended_and_one_at_work_is_not(world: World) -> None:
    children = {}
    for number, name in enumerate(("idle", "busy")):
        world.hand_over(name, number)
        children[name] = world.child(name)
        world.says(name, STARTED, children[name])
    world.says("idle", EXITED, children["idle"], 0)
    for name in ("idle", "busy"):
        age(world, name, 1000)
    assert list(world.attachments.spawners) == ["busy"]
    assert world.attachments.check() is not None


def test_one_that_is_expected_to_be_used_is_kept_for_its_first_command(world: World) -> None:
    world.attachments.prepare("one", 3600)
    world.says("one", ENTERED)
    age(world, "one", 1000)
    assert "one" in world.attachments.spawners
    world.hand_over("one", 1)
    child = world.child("one")
    world.says("one", STARTED, child)
    world.says("one", EXITED, child, 0)
    age(world, "one", 1000)
    assert not world.attachments.spawners


def test_there_is_room_for_so_many_and_those_at_work_are_not_ended_for_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attaching, "_MAX_SPAWNERS", 2)
    for number, name in enumerate(("first", "second")):
        world.attachments.prepare(name, 10)
        world.says(name, ENTERED)
        assert number + 1 == len(world.attachments.spawners)
    world.hand_over("first", 1)
    world.attachments.prepare("third", 10)
    assert set(world.attachments.spawners) == {"first", "third"}, "the least recently used one"
    world.says("third", ENTERED)
    world.hand_over("third", 2)
    assert world.attach("fourth", 3) == {"pid": 1, "pid_inside": 1}
    assert world.otherwise == [3]
    assert set(world.attachments.spawners) == {"first", "third"}


def test_without_spawners_there_is_nothing_to_look_after(world: World) -> None:
    assert world.attachments.check() is None
    world.attachments.prepare("one", 10)
    assert world.attachments.check() is not None
    world.attachments.forget("one")
    assert world.attachments.check() is None


# Handing over ----------------------------------------------------------------------------------


def test_commands_wait_for_one_another_and_each_is_answered_once(world: World) -> None:
    world.hand_over("one", 1)
    assert world.attach("one", 2) is None
    child = world.child("one")
    world.says("one", STARTED, child)
    assert world.peers["one"].recv(4096) == ACKNOWLEDGED
    assert world.peers["one"].recv(4096).startswith(b"{")
    world.says("one", STARTED, world.processes["one"].pid)
    assert [(each["id"], each["pid"]) for each in world.sent] == [
        (1, child),
        (2, world.processes["one"].pid),
    ]
    world.says("one", EXITED, child, 256)
    world.says("one", EXITED, child, 256)
    assert world.sent[2:] == [{"exit": 1, "status": 256}]


def test_what_a_spawner_refuses_is_started_otherwise(world: World) -> None:
    world.hand_over("one", 1)
    world.says("one", REFUSED, 0, 2)
    assert world.otherwise == [1]
    assert world.sent == [{"id": 1, "pid": 1, "pid_inside": 1}]


def test_what_was_handed_over_to_one_that_dies_is_not_started_again(world: World) -> None:
    world.hand_over("one", 1)
    assert world.attach("one", 2) is None
    world.peers["one"].close()
    world.hears("one")
    assert world.otherwise == [2], "only what has waited"
    assert [each["id"] for each in world.sent if "error" in each] == [1]
    assert not world.sent[0]["at_limit"], "the agent would try again"
    assert (world.path / "exec-1" / "cgroup.kill").read_text() == "1"


def test_commands_of_one_that_dies_are_reported_as_killed(world: World) -> None:
    world.hand_over("one", 1)
    world.says("one", STARTED, world.child("one"))
    world.peers["one"].close()
    world.hears("one")
    assert world.sent[1:] == [{"exit": 1, "status": 9}]


def test_one_that_never_arrives_is_done_without(world: World) -> None:
    assert world.attach("one", 1) is None
    world.peers["one"].close()
    world.hears("one")
    assert world.otherwise == [1]


def test_nobody_waits_for_one_that_hangs(world: World) -> None:
    world.hand_over("one", 1)
    assert world.attach("one", 2) is None
    age(world, "one", 2)
    assert world.otherwise == [2]
    assert world.attach("one", 3) == {"pid": 1, "pid_inside": 1}
    age(world, "one", 60)
    assert "error" in world.sent[-1]
    assert world.sent[-1]["id"] == 1
    assert not world.attachments.spawners


def test_a_command_is_answered_early_if_its_spawner_cannot_report_it(world: World) -> None:
    """Somebody inside has stopped it before it was a command, and so its spawner (vfork(2))."""
    world.hand_over("one", 1)
    child = world.child("one")
    (world.path / "exec-1" / "cgroup.procs").write_text(f"{child}\n")
    age(world, "one", 2)
    assert [(each["id"], each["pid"]) for each in world.sent] == [(1, child)]
    assert world.attach("one", 2) is not None, "which does not wait for it"
    age(world, "one", 1000)
    assert "one" in world.attachments.spawners, "the command may take its time"
    world.says("one", STARTED, child)
    assert world.peers["one"].recv(4096) == ACKNOWLEDGED
    assert len(world.sent) == 1
    world.hand_over("one", 3)


def test_a_command_that_was_answered_early_and_then_refused_has_ended(world: World) -> None:
    """It was stopped before it was a command, continued, and could not become one."""
    world.hand_over("one", 1)
    child = world.child("one")
    (world.path / "exec-1" / "cgroup.procs").write_text(f"{child}\n")
    age(world, "one", 2)
    assert world.sent == [{"id": 1, "pid": child, "pid_inside": child}]
    world.says("one", REFUSED, 0, 8)
    assert world.sent[1:] == [{"exit": 1, "status": NOT_STARTED}], "whoever waits for it is told"
    assert not world.otherwise, "it was answered already"
    assert not world.attachments.attached
    world.hand_over("one", 2)


def test_a_container_that_has_ended_is_said_to_have(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(_: str) -> Doorway:
        raise EnteringFailed("The container does not run.")

    monkeypatch.setattr(Doorway, "find", find)
    world.attachments.prepare("one", 10)
    assert not world.attachments.spawners
