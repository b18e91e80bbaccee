"""What the agent waits for: its launchers, the process of a file operation, Squid, an archive."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hostruntime.container import dismantling, files, launcher, tmpfs
from hostruntime.container.exec import Chunk, Exited, Frame
from hostruntime.container.inside_files import LENGTH
from hostruntime.container.launcher import LauncherLost, Link
from hostruntime.errors import Exhausted, HostError, HostFault, HostUnavailable
from hostruntime.host.patience import process_tree
from hostruntime.network import egress
from hostruntime.network.policy import NO_POLICY
from hostruntime.sandbox import snapshots
from tests.programs import IDLING, WORKING, python, running

# Answers the first request it is sent, when it has worked for a while; sleeps instead if told so.
LAUNCHER = (
    WORKING.replace('print("done", flush=True)', "")
    + """\
import json, os, struct, sys
if sys.argv[3] == "fork":
    # As a start does, which is then what is at work.
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        os._exit(0)
    for _ in range(int(sys.argv[4])):
        burst()
if sys.argv[3] == "sleep":
    time.sleep(600)
body = json.dumps({"id": 1, "init_pid": 42}).encode()
os.write(int(sys.argv[2]), struct.pack("!I", len(body)) + body)
os._exit(0)
"""
)


async def asked(bursts: int, what: str = "answer", more: int = 0) -> dict[str, Any]:
    """The answer of a launcher that works for so long."""
    ours, theirs = socket.socketpair()
    with theirs:
        argv = python(LAUNCHER, bursts, theirs.fileno(), what, more)
        process = subprocess.Popen(argv, pass_fds=[theirs.fileno()])
    ours.settimeout(0)
    link = Link(process, ours)
    link._reader = asyncio.create_task(link._read())
    try:
        return await link.request({"do": "start"})
    finally:
        await link.close()
        assert process.returncode is not None


@pytest.mark.parametrize(("bursts", "what", "more"), [(6, "answer", 0), (0, "fork", 6)])
async def test_a_launcher_that_works_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, bursts: int, what: str, more: int
) -> None:
    monkeypatch.setattr(launcher, "_REQUEST_TIMEOUT_SECONDS", 0.8)
    assert (await asked(bursts, what, more))["init_pid"] == 42


async def test_a_launcher_that_hangs_is_killed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(launcher, "_REQUEST_TIMEOUT_SECONDS", 0.8)
    with pytest.raises(LauncherLost, match="hung, and was replaced") as caught:
        await asked(0, "sleep")
    # No defect, as whoever asks is told: there is another, so it is to be asked again.
    told = HostError.from_wire(caught.value.to_wire(), caught.value.status)
    assert isinstance(told, HostUnavailable)
    assert "it did nothing for 0.8 s (python" in caplog.text


async def test_what_a_launcher_runs_for_others_is_not_its_own_work() -> None:
    """A command that burns the CPU is a child of the launcher, too; LXC may hang all the same."""
    busy = "import subprocess, time\nsubprocess.Popen(['sh', '-c', 'while :; do :; done']).wait()"
    ours, theirs = socket.socketpair()
    with running(python(busy)) as process, theirs:
        link = Link(process, ours)
        await settled(process.pid)
        assert [pid for pid in link._processes() if pid != process.pid] == []
        for pid in process_tree(process.pid)[1:]:
            os.kill(pid, signal.SIGKILL)
    ours.close()


async def settled(pid: int) -> None:
    """Until a process has a child that is a program of its own."""
    while not any(
        Path(f"/proc/{child}/comm").read_text() == "sh\n"
        for child in process_tree(pid)
        if child != pid
    ):
        await asyncio.sleep(0.05)


# File operations ------------------------------------------------------------------------------


async def header_of(argv: list[str], after: float | None) -> dict[str, Any]:
    """What is read of an operation whose process answers after so many seconds, or never."""
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=ours)
    with running(argv) as process, theirs:
        peer = files._Peer(reader, writer, cast("Any", SimpleNamespace(pid=process.pid)))
        if after is not None:
            body = json.dumps({"size": 3}).encode()
            loop = asyncio.get_running_loop()
            loop.call_later(after, theirs.sendall, LENGTH.pack(len(body)) + body)
        try:
            return await peer.header()
        finally:
            writer.close()


async def test_a_file_operation_that_works_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_STEP_TIMEOUT_SECONDS", 0.8)
    assert await header_of(python(WORKING, 30), 2.5) == {"size": 3}
    with pytest.raises(Exhausted, match="did not finish the file operation in time"):
        await header_of(["sleep", "600"], None)


# The proxy ------------------------------------------------------------------------------------

PROXY = (
    WORKING.replace('print("done", flush=True)', "").replace("range(int(sys.argv[1]))", "()")
    + """\
import socket
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
while True:
    client, _ = listener.accept()
    asked = client.recv(4096)
    for _ in range(int(sys.argv[1])):
        burst()
    if sys.argv[1] == "0":
        time.sleep(600)
    client.sendall(b"HTTP/1.1 200 OK\\r\\n\\r\\n" if b"peek" in asked else sys.argv[2].encode())
    client.close()
"""
)


@contextmanager
def proxy(bursts: int) -> Iterator[egress.EgressProxy]:
    """The agent's side of a proxy that works for so long on each request; 0 is for ever."""
    argv: list[str] = python(PROXY, bursts, f"HTTP/1.1 403\r\n\r\n{NO_POLICY}")
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        made = object.__new__(egress.EgressProxy)
        made.pool = cast("Any", SimpleNamespace(proxy_address=lambda: ("127.0.0.1", port)))
        made.processes = lambda: [process.pid]  # type: ignore[method-assign]
        made.helpers = list  # type: ignore[method-assign]
        made._has_master = lambda: True  # type: ignore[method-assign]
        try:
            yield made
        finally:
            process.kill()


def test_a_proxy_that_is_slow_to_answer_is_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken for dead it would be started anew, which cuts every tunnel."""
    monkeypatch.setattr(egress, "_PROBE_SECONDS", 0.8)
    with proxy(4) as slow:
        assert slow.healthy()
    with proxy(0) as hung:
        began = time.monotonic()
        assert not hung.healthy()
        assert time.monotonic() - began < 30


# An archive -----------------------------------------------------------------------------------


class Archiver:
    """Containers in which an archiver writes a piece every so often, and may then hang."""

    def __init__(self, pieces: int, *, hangs: bool) -> None:
        self._pieces = pieces
        self._hangs = hangs
        self.closed = False

    async def exec(self, *_: object, **__: object) -> AsyncGenerator[Frame, None]:
        try:
            for _piece in range(self._pieces):
                await asyncio.sleep(0.3)
                yield Chunk("stdout", b"piece")
            if self._hangs:
                await asyncio.sleep(600)
            yield Exited(0, None, 1)
        finally:
            self.closed = True


async def test_an_archive_that_grows_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tmpfs, "scaled", lambda seconds: seconds)
    slow, hung = Archiver(6, hangs=False), Archiver(1, hangs=True)
    for archiver, status in ((slow, 0), (hung, None)):
        path = tmp_path / str(status)
        made = await tmpfs.save_tmpfs(
            cast("Any", archiver), "owner", path, max_bytes=1000, timeout=0.8
        )
        assert made == status
        assert archiver.closed
    assert (tmp_path / "0").read_bytes() == b"piece" * 6


class StandingDisk(io.RawIOBase):
    """A file whose writes take until the event loop has had a turn, or for some seconds.

    As with a real one, its position is known once what is being written has been: Linux has a lock
    for both (f_pos_lock).
    """

    def __init__(self) -> None:
        self.turn = threading.Event()
        self.had_turn = True
        self.position = threading.Lock()

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        with self.position:
            self.had_turn &= self.turn.wait(5)
        return len(data)

    def seek(self, *_: int) -> int:
        with self.position:
            return 0


async def test_an_archive_on_a_disk_that_stands_still_keeps_nobody_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tmpfs, "scaled", lambda seconds: seconds)
    disk = StandingDisk()
    monkeypatch.setattr(tmpfs, "_create", lambda _: io.BufferedWriter(disk, buffer_size=2))
    monkeypatch.setattr(tmpfs, "_unlink_if_empty", lambda _: None)
    # Meanwhile it is looked at how far the archive is, several times.
    asyncio.get_running_loop().call_later(1.2, disk.turn.set)
    archiver = Archiver(2, hangs=False)
    await tmpfs.save_tmpfs(cast("Any", archiver), "owner", tmp_path, max_bytes=100, timeout=2)
    assert disk.had_turn


# Processes that are to end, or to stand still ---------------------------------------------------


def test_a_process_that_is_slow_to_end_is_waited_for() -> None:
    for argv, ended in ((python(WORKING, 5), True), (python(IDLING), False)):
        with subprocess.Popen(argv, stdout=subprocess.DEVNULL) as process:
            assert dismantling._wait_for_exit(process.pid, 0.8) is ended
            process.kill()


def test_a_group_that_does_not_freeze_while_it_works_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Processes freeze when they are next given the CPU, which may take its time."""
    monkeypatch.setattr(snapshots, "FREEZE_SECONDS", 0.8)
    monkeypatch.setattr(snapshots, "freeze_group", lambda *_, **__: None)
    began = time.monotonic()
    monkeypatch.setattr(snapshots, "is_frozen", lambda _: time.monotonic() > began + 2.5)
    for argv, stands in ((python(WORKING, 30), True), (["sleep", "600"], False)):
        with running(argv) as process:
            monkeypatch.setattr(snapshots, "pids_under", lambda _, pid=process.pid: [pid])
            began = time.monotonic()
            with contextlib.ExitStack() as stack:
                if not stands:
                    stack.enter_context(pytest.raises(HostFault, match="blocked in the kernel"))
                stack.enter_context(snapshots.frozen(Path(sys.prefix)))
