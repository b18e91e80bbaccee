"""The process on the host that belongs to one background command, and outlives agent and launcher.

A launcher forks it.  It enters the container and starts the command there like any other
(:mod:`hostruntime.container.entering`), but as its own child.  From then on it

* reads what the command prints, at a bounded pace, and keeps the end of it
  (:mod:`hostruntime.container.command_log`), whether anybody follows or not;
* writes how the command ended into its status file, as JSON (:class:`hostruntime.sandbox.background
  .Status` says what is in there);
* ends once the command has, and no process that it left behind can print any more.

It is in the control groups of the container's LXC monitor: it is charged to no limit of the
container and does not freeze with it, and whatever ends the container ends it (:func:`hostruntime
.container.dismantling.end_processes`).  Its status file is locked (flock(2)) for as long as it
lives, by the descriptor that the agent opened: that is how an agent that did not start it knows.
What it holds of the container's is that the command's pipe; the log is on the container's own disk.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from hostruntime.container.cgroups import ContainerGroups, cgroup_layout
from hostruntime.container.command_log import MAX_WRITE_BYTES, LogWriter
from hostruntime.container.entering import Confinement, Doorway, EnteringFailed, enter
from hostruntime.container.inside_exec import Command, become_command
from hostruntime.container.inside_files import keep_only
from hostruntime.host import kernel

DESCRIPTOR_COUNTS = (3, 4)
"""The log, the status file, a pipe for the answer, and perhaps what the command reads."""
_TITLE = "orkestr hostruntime.container.supervisor"
# Behind the standard descriptors, in this order.
_INIT, _LOG, _STATUS, _ANSWER, _INPUT = range(3, 8)
# A flood of output must not be worth a core, nor the host's disk: a command that prints more than
# this waits. It is twice what is kept.
_BYTES_PER_SECOND = 8 * 1024 * 1024
# Nor must many small pieces, each of which costs a turn here and wakes whoever follows: what comes
# meanwhile is read together.  A pipe takes no more than that pace in this time (pipe(7)).
_PAUSE_SECONDS = 0.002
# Somebody inside can stop a process before it becomes the command: nobody waits for that.
_START_SECONDS = 1.0
_RETRY_SECONDS = 0.05
_NICE = 5
_MAX_FAILURE_BYTES = 4096
_SIGNAL_READ_BYTES = 4096


def fork(
    doorway: Doorway, confinement: Confinement, message: Mapping[str, Any], fds: Sequence[int]
) -> None:
    """Fork a supervisor, which answers on the last of ``fds``.  Raises OSError.

    It is no child of this process: a launcher or agent that hangs is killed with all its children.
    """
    intermediate = os.fork()
    if intermediate == 0:
        try:
            if os.fork() == 0:
                _run(doorway, confinement, message, fds)
        finally:
            os._exit(0)
    os.waitpid(intermediate, 0)


def _run(
    doorway: Doorway, confinement: Confinement, message: Mapping[str, Any], fds: Sequence[int]
) -> NoReturn:
    try:
        kernel.set_command_line(_TITLE)
        os.setsid()
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        for number in range(_INIT):
            os.dup2(null, number, inheritable=False)
        # Closes all that is the launcher's, the agent's lock above all.
        keep_only(doorway.pidfd, *fds)
        # A collection would write to every page that is still shared with the launcher.
        gc.disable()
        stdin = _INPUT if len(fds) == max(DESCRIPTOR_COUNTS) else 0
        _serve(Doorway(_INIT, doorway.groups), confinement, message, stdin)
    finally:
        os._exit(1)


def _serve(
    doorway: Doorway, confinement: Confinement, message: Mapping[str, Any], stdin: int
) -> None:
    groups = cgroup_layout().container(str(message["name"]))
    try:
        # First: from here on, whatever ends the container ends this as well.
        for group in groups.monitor_groups():
            (group / "cgroup.procs").write_text(str(os.getpid()))
        supervised, refusal = _start(doorway, confinement, message, groups, stdin)
    except (EnteringFailed, OSError) as error:
        _answer({"error": f"{type(error).__name__}: {error}"})
        return
    os.close(_INIT)
    if stdin:
        # It is the command's alone: what it listens on ends with it.
        os.close(stdin)
    # Not earlier: the command would have it, too.
    os.nice(_NICE)
    if refusal.get("code") == "cwd_not_found":
        _answer(refusal)
        supervised.discard()
        return
    supervised.print(refusal.get("detail", ""))
    supervised.write_status()
    _answer({"pid": supervised.pid_inside})
    os.close(_ANSWER)
    supervised.run()


def _answer(answer: Mapping[str, Any]) -> None:
    # The agent may have died meanwhile.
    with contextlib.suppress(OSError):
        os.write(_ANSWER, json.dumps(answer).encode())


def _start(
    doorway: Doorway,
    confinement: Confinement,
    message: Mapping[str, Any],
    groups: ContainerGroups,
    stdin: int,
) -> tuple[_Supervised, dict[str, str]]:
    """Start the command; why it could not be run is in the second item, else that is empty."""
    out, out_in = os.pipe()
    failure, failure_in = os.pipe()
    gate, gate_in = os.pipe()
    command = Command(
        argv=[str(word) for word in message["argv"]],
        cwd=str(message["cwd"]),
        env={str(key): str(value) for key, value in message["env"].items()},
        stdin=stdin,
        stdout=out_in,
        stderr=out_in,
        gate=gate,
        status=failure_in,
    )
    group = groups.background_group(str(message["command"]))
    oom_kills = groups.oom_kills()
    pid, inside = enter(doorway, confinement, group, lambda: become_command(command))
    supervised = _Supervised(pid, inside or 0, out, groups, str(group), oom_kills)
    # Not if the agent has given up: it removes the files before it kills what is in the group.
    if os.fstat(_STATUS).st_nlink:
        os.write(gate_in, b"1")
    for each in (out_in, failure_in, gate, gate_in):
        os.close(each)
    refusal = _read_refusal(failure)
    os.close(failure)
    return supervised, refusal


def _read_refusal(failure: int) -> dict[str, str]:
    poller = select.poll()
    poller.register(failure, select.POLLIN)
    data = os.read(failure, _MAX_FAILURE_BYTES) if poller.poll(_START_SECONDS * 1000) else b""
    return dict(json.loads(data)) if data else {}


@dataclass
class _Supervised:
    """A command, until its last process cannot print any more."""

    pid: int
    pid_inside: int
    output: int
    groups: ContainerGroups
    group: str
    oom_kills: int
    pidfd: int = field(init=False)
    log: LogWriter = field(default_factory=lambda: LogWriter(_LOG))
    poller: select.poll = field(default_factory=select.poll)
    started_at: float = field(default_factory=time.monotonic)
    status: int | None = None
    printing: bool = True

    def __post_init__(self) -> None:
        self.pidfd = os.pidfd_open(self.pid)
        os.set_blocking(self.output, False)

    def run(self) -> None:
        """Serve until the end."""
        child_signals = kernel.create_signalfd(signal.SIGCHLD)
        for each in (self.output, self.pidfd, child_signals):
            self.poller.register(each, select.POLLIN)
        self._reap()
        while self.printing or self.status is None:
            for descriptor, _ in self.poller.poll():
                if descriptor == self.output:
                    # It may have been closed by what came before in this round.
                    if self.printing:
                        self._read()
                elif descriptor == child_signals:
                    os.read(child_signals, _SIGNAL_READ_BYTES)
                    self._reap()
                else:
                    self._exited()
        self.log.finish()
        self._remove_group()

    def discard(self) -> None:
        """Wait for a command that has said why it does not run."""
        os.waitpid(self.pid, 0)
        self._remove_group()

    def print(self, line: str) -> None:
        """Add a line to the log, if it is not empty."""
        if line:
            self._write(f"{line}\n".encode())

    def write_status(self, **more: Any) -> None:
        """Write the status file in one piece; what comes later is always longer."""
        # The host's disk may be full: nobody then hears how the command ends, but it runs on.
        with contextlib.suppress(OSError):
            os.pwrite(_STATUS, json.dumps({"pid": self.pid_inside, **more}).encode(), 0)

    def _read(self) -> bool:
        """Read a piece of output; False if there is none now."""
        try:
            data = os.read(self.output, MAX_WRITE_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self.poller.unregister(self.output)
            os.close(self.output)
            self.printing = False
            return False
        self._write(data)
        time.sleep(max(len(data) / _BYTES_PER_SECOND, _PAUSE_SECONDS))
        return True

    def _write(self, data: bytes) -> None:
        # The container's own disk can fail; its command is not to wait for it.
        with contextlib.suppress(OSError):
            self.log.write(data)

    def _reap(self) -> None:
        """Reap every child that has exited: a command can make more of them (CLONE_PARENT)."""
        with contextlib.suppress(ChildProcessError):
            while (reaped := os.waitpid(-1, os.WNOHANG))[0]:
                pid, status = reaped
                # A command can make its parent its tracer, who is also told when it stops.
                if pid == self.pid and not os.WIFSTOPPED(status):
                    self._ended(status)

    def _exited(self) -> None:
        self._reap()
        if self.status is None:
            # A traced process is reaped by its tracer first, which may take forever (ptrace(2)).
            status = None
            with contextlib.suppress(OSError):
                status = kernel.exit_status(self.pid)
            if status is None:
                time.sleep(_RETRY_SECONDS)
            else:
                self._ended(status)

    def _ended(self, status: int) -> None:
        if self.status is not None:
            return
        self.status = status
        duration = round((time.monotonic() - self.started_at) * 1000)
        self.poller.unregister(self.pidfd)
        os.close(self.pidfd)
        # What it has printed comes first; what it left behind may print forever.
        rest = MAX_WRITE_BYTES * 16
        while rest > 0 and self.printing and self._read():
            rest -= MAX_WRITE_BYTES
        oom = status != 0 and self.groups.oom_kills() > self.oom_kills
        self.write_status(status=status, duration_ms=duration, out_of_memory=oom)

    def _remove_group(self) -> None:
        # Not if a process that prints nothing is left in there: it can still be killed.  If one
        # is just ending, the agent removes it later.
        with contextlib.suppress(OSError):
            os.rmdir(self.group)  # noqa: PTH106 - a path as text, like everything of cgroups here
