"""What the launchers' processes do when something fails halfway; no container is needed."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
from pathlib import Path

import pytest

from hostruntime.container.entering import Confinement, Doorway, _spawn_inside
from hostruntime.container.launcher import LauncherPool
from hostruntime.host.kernel import SyscallFilter
from tests.programs import python

_AT_THE_GATE = """
import os, socket
from hostruntime.container.inside_files import serve
ours, theirs = socket.socketpair()
gate, opener = os.pipe()
pid = os.fork()
if pid == 0:
    serve("stat", {"path": "/"}, theirs.fileno(), gate)
# It has a copy of the end that would open the gate, as of all that is the launcher's.
os.close(opener)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
_ROOT_INSIDE = """
import ctypes
from hostruntime.container import entering
from hostruntime.host import kernel
kernel.set_dumpable(dumpable=True)
entering._become_container_root()
print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))
"""


def open_descriptors() -> list[Path]:
    return sorted(Path("/proc/self/fd").iterdir())


def said_by(program: str) -> str:
    done = subprocess.run(python(program), capture_output=True, text=True, timeout=30, check=True)
    return done.stdout.strip()


def test_what_waits_at_a_gate_that_nobody_will_open_ends() -> None:
    """Its launcher has died: it is in no control group of the container, and never will be."""
    assert said_by(_AT_THE_GATE) == "1"


def test_nobody_inside_may_look_into_what_enters_whatever_the_host_dumps() -> None:
    """With fs.suid_dumpable at 1, changing its ids would lay the launcher's memory open."""
    assert said_by(_ROOT_INSIDE) == "0"


def test_a_fork_that_fails_costs_the_launcher_no_descriptor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def out_of_processes() -> int:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", out_of_processes)
    before = open_descriptors()
    with pytest.raises(OSError, match="temporarily"):
        _spawn_inside(Doorway(-1, (Path("/"),)), Confinement(SyscallFilter(b""), ()), os.abort)
    assert set(open_descriptors()) <= set(before)


async def test_a_supervisors_answer_is_heard_whoever_else_has_its_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As has a command that was stopped from inside before it closed that."""
    launchers, copies = LauncherPool(tmp_path, tmp_path / "log"), []

    async def supervise(_: str, __: object) -> None:
        copies.append(os.dup(descriptors[-1]))
        os.write(copies[0], b"started")

    monkeypatch.setattr(launchers, "_retry_at_limit", supervise)
    answer, answer_in = os.pipe()
    descriptors = [answer_in]
    try:
        async with asyncio.timeout(10):
            assert await launchers.supervise({"name": "a"}, descriptors, answer) == b"started"
        assert descriptors == []
        os.close(copies.pop())
    finally:
        for each in (answer, *copies):
            os.close(each)
