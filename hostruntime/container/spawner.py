"""The launcher's side of a spawner: a process inside one container that starts commands there.

To enter a container takes a launcher two forks and some milliseconds (:func:`entering.enter`).  A
spawner has done it already: it has joined the container's namespaces and confined itself exactly
as a command is, and waits for commands on a socket (:mod:`hostruntime.container.inside_spawner`).
It is safe to keep:

* it is not in the container's pid namespace, so nobody inside can see, signal or trace it; and it
  holds nothing of the host's but that socket, a signalfd and the null device;
* while it waits, it is in the launcher's own control groups: it is charged to no container, freezes
  with none, and is none's to kill for lack of memory.  It moves into a command's groups for as long
  as it takes to start the command, which is therefore born in them;
* it dies with the launcher, with the container, and when it is not used.

A command whose parent dies can no longer be observed; it is killed, as when a launcher dies.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from hostruntime.container.cgroups import kill_group, pids_in
from hostruntime.container.entering import Confinement, Doorway, join
from hostruntime.container.inside_files import keep_only
from hostruntime.container.inside_spawner import (
    ACKNOWLEDGED,
    ENTERED,
    EXITED,
    MAX_COMMAND_BYTES,
    REFUSED,
    REPLY,
    STARTED,
    serve,
)
from hostruntime.host import kernel

IDLE_SECONDS = 60.0
"""How long a spawner is kept that has no command running."""
STUCK_SECONDS = 1.0
"""How long the start of a command may hold up the next ones of its container."""
HOPELESS_SECONDS = 15.0
"""How long a spawner may take to begin with anything at all."""
_END_SECONDS = 1.0
_FIRST_DESCRIPTOR = 3
# A command shows this until it is one, as its memory is the spawner's.
_TITLE = "orkestr hostruntime.container.spawner"


@dataclass
class Job:
    """A command on its way; it owns its descriptors."""

    request: int
    message: Mapping[str, Any]
    group: Path
    fds: list[int]
    # Kept so that the command can be watched, however many descriptors there are by then.
    reserved: int

    def close(self) -> None:
        """Close the descriptors."""
        for each in (*self.fds, self.reserved):
            os.close(each)


@dataclass(frozen=True)
class Entered:
    """The spawner is inside."""


@dataclass(frozen=True)
class Spawned:
    """The current command has been started; the spawner waits to be acknowledged."""

    pid: int


@dataclass(frozen=True)
class Refused:
    """The current command could not be started: nothing of it runs, or ever has."""


@dataclass(frozen=True)
class Exited:
    """A child of the spawner has exited; ``status`` is its wait status (wait(2))."""

    pid: int
    status: int


@dataclass(frozen=True)
class Ended:
    """The spawner has exited or was killed."""


Event = Entered | Spawned | Refused | Exited | Ended


@dataclass
class Spawner:
    """One spawner, from its fork until its socket ends."""

    name: str
    pid: int
    pidfd: int
    sock: socket.socket
    doorway: Doorway
    entered: bool = False
    current: Job | None = None
    # The child that the launcher has found before the spawner could report it.
    early: int | None = None
    waiting: deque[Job] = field(default_factory=deque)
    running: int = 0
    # Until when it is kept for its first command.
    expected_until: float = 0.0
    since: float = field(default_factory=time.monotonic)

    @classmethod
    def fork(cls, name: str, doorway: Doorway, confinement: Confinement) -> Spawner:
        """Send a new spawner on its way; it reports when it is inside.  Raises OSError."""
        with contextlib.ExitStack() as undo:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.callback(ours.close)
            with theirs:
                pid = os.fork()
                if pid == 0:
                    _run(theirs, doorway.pidfd, confinement)
            # Without its socket, it exits.
            pidfd = os.pidfd_open(pid)
            undo.pop_all()
        ours.setblocking(False)  # noqa: FBT003 - positional-only
        return cls(name, pid, pidfd, ours, doorway)

    @property
    def is_ready(self) -> bool:
        """Whether it can be given a command now."""
        return self.entered and self.current is None and self.early is None

    @property
    def is_stuck(self) -> bool:
        """Whether it has been at one thing for too long: commands must not wait for it."""
        return not self.is_ready and time.monotonic() > self.since + STUCK_SECONDS

    @property
    def is_hopeless(self) -> bool:
        """Whether it has not even begun with a command, or arrived, for far too long."""
        waits = self.current is not None or not self.entered
        return waits and time.monotonic() > self.since + HOPELESS_SECONDS

    @property
    def is_expired(self) -> bool:
        """Whether it is idle, and has been for so long that it may be ended."""
        now = time.monotonic()
        return self.is_idle and now > max(self.since + IDLE_SECONDS, self.expected_until)

    @property
    def is_idle(self) -> bool:
        """Whether nothing would be lost without it."""
        return self.is_ready and not self.running and not self.waiting

    def start(self, job: Job) -> None:
        """Hand over a command; the next event says what became of it.

        Raises OSError: then it was not handed over.  Whatever happens after that, it must not be
        started again, as it may have run, unless it is refused.
        """
        command = {key: job.message[key] for key in ("argv", "cwd", "env")}
        data = json.dumps(command, separators=(",", ":")).encode()
        if len(data) > MAX_COMMAND_BYTES:
            raise OSError("the command is too long for a datagram")
        try:
            self.doorway.move_in(self.pid, job.group)
            socket.send_fds(self.sock, [data], job.fds)
        except OSError:
            self.leave()
            raise
        self.current, self.since, self.expected_until = job, time.monotonic(), 0.0

    def leave(self) -> None:
        """Move it back to the launcher's own groups.  If it has died, that is another event."""
        self.doorway.move_out(self.pid)

    def acknowledge(self) -> None:
        """Let it go on after :class:`Spawned`."""
        with contextlib.suppress(OSError):
            self.sock.send(ACKNOWLEDGED)

    def receive(self) -> Event | None:
        """The next event, None if there is none."""
        try:
            data = self.sock.recv(REPLY.size)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        if len(data) != REPLY.size:
            return Ended()
        kind, pid, status = REPLY.unpack(data)
        if kind == ENTERED:
            return Entered()
        if kind == STARTED:
            return Spawned(pid)
        return Exited(pid, status) if kind == EXITED else Refused() if kind == REFUSED else Ended()

    def find_child(self) -> int | None:
        """The process of the current command, if it exists although it was not reported yet.

        Somebody inside may have stopped it before it became the command, and the spawner with it;
        or both wait for CPU time.  It is the oldest child in the command's own group: nothing
        else can be in there before it.
        """
        if self.current is None:
            return None
        members = set(pids_in(self.current.group))
        try:
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        except OSError:
            return None
        return next((int(pid) for pid in children if int(pid) in members), None)

    def end(self) -> None:
        """Kill it, and wait until it no longer holds the container's mounts; close everything."""
        if self.current is not None:
            kill_group(self.current.group)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        # It dies at once unless a disk hangs; other containers must not wait for that.
        if has_exited(self.pidfd, _END_SECONDS):
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)
        os.close(self.pidfd)
        self.sock.close()


def has_exited(pidfd: int, seconds: float = 0.0) -> bool:
    """Whether a process has exited, or does so within this time."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(seconds * 1000))


def _run(sock: socket.socket, init: int, confinement: Confinement) -> NoReturn:
    """Become a spawner in the container of ``init``, a pidfd."""
    try:
        kernel.set_command_line(_TITLE)
        os.setsid()
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        for number in range(_FIRST_DESCRIPTOR):
            os.dup2(null, number, inheritable=False)
        # Closes all that is the launcher's: the sockets of other spawners, above all.
        keep_only(sock.fileno(), init)
        join(_FIRST_DESCRIPTOR + 1, confinement)
        os.close(_FIRST_DESCRIPTOR + 1)
        kernel.die_with_parent()
        os.chdir("/")
        os.umask(0o022)
        # A collection would write to every page that is still shared with the launcher.
        gc.disable()
        serve(socket.socket(fileno=_FIRST_DESCRIPTOR), kernel.create_signalfd(signal.SIGCHLD))
    finally:
        os._exit(1)
