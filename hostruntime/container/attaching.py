"""What a launcher has put into containers: commands, file operations, and spawners.

A command is started by its container's spawner (:mod:`hostruntime.container.spawner`).  Everything
else, and what no spawner can start, enters in its own way (:mod:`hostruntime.container.entering`).
A command is never started twice: what was handed to a spawner may have run.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from hostruntime.container import inside_files, supervisor
from hostruntime.container.cgroups import pid_inside
from hostruntime.container.entering import Confinement, Doorway, EnteringFailed, enter
from hostruntime.container.inside_exec import Command, become_command
from hostruntime.container.inside_spawner import DESCRIPTOR_COUNT
from hostruntime.container.spawner import (
    Ended,
    Entered,
    Exited,
    Job,
    Refused,
    Spawned,
    Spawner,
    has_exited,
)
from hostruntime.host import kernel

_CHECK_SECONDS = 1.0
# One costs some two megabytes. A container whose command finds no room has it started without.
_MAX_SPAWNERS = 64
_GO = b"1"
NOT_STARTED = 126 << 8
"""The wait status (wait(2)) reported for a command that was answered before it was refused."""
# The number of descriptors in a request to attach, by call.
_DESCRIPTOR_COUNTS = {"exec": DESCRIPTOR_COUNT, "file": 1}


# Errors that mean that the host or this process is at a limit, and never the container: a process
# is charged to the container's limits only at the end.
_HOST_LIMIT_ERRNOS = frozenset({errno.EMFILE, errno.ENFILE, errno.EAGAIN})


class RequestFailed(Exception):  # noqa: N818 - an answer to the agent
    """A request that failed; the text is sent to the agent."""


class DescriptorsLost(Exception):  # noqa: N818 - an answer to the agent
    """The descriptors of a request could not be received (MSG_CTRUNC in recv(2))."""

    errno = errno.EMFILE


EXPECTED_ERRORS = (RequestFailed, EnteringFailed, DescriptorsLost)


@dataclass
class Attached:
    """A process inside; ``request`` is the number that its exit is reported with."""

    request: int
    pid: int
    pidfd: int
    # Its parent, unless that is this process.
    spawner: Spawner | None = None


@dataclass
class Attachments:
    """The processes that one launcher has put into containers.

    ``send`` sends a message to the agent; ``poller`` is told which descriptors to watch, and each
    event of one of them belongs to :meth:`handle`.
    """

    confinement: Confinement
    poller: select.poll
    send: Callable[[Mapping[str, Any]], None]
    attached: dict[int, Attached] = field(default_factory=dict)
    doorways: dict[str, Doorway] = field(default_factory=dict)
    # The least recently used one first.
    spawners: dict[str, Spawner] = field(default_factory=dict)
    spawners_by_fd: dict[int, Spawner] = field(default_factory=dict)
    next_check: float = 0.0

    def handle(self, fd: int) -> bool:
        """Handle an event; False if the descriptor is none of these."""
        if fd in self.spawners_by_fd:
            self._serve_spawner(self.spawners_by_fd[fd])
            return True
        if fd in self.attached:
            self._report_exit(fd)
            return True
        return False

    def kill(self) -> None:
        """Kill all processes, as nobody can watch them any more."""
        for process in self.attached.values():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(process.pidfd, signal.SIGKILL)

    def prepare(self, name: str, seconds: float) -> None:
        """Have a spawner in a container, if there is room, and keep it for its first command."""
        spawner = self._spawner(name)
        if spawner is not None:
            spawner.expected_until = time.monotonic() + seconds

    def attach(self, message: Mapping[str, Any], fds: list[int]) -> dict[str, Any] | None:
        """Put a process into a container; None if the response is sent when it has started.

        Takes what it needs later from ``fds``.  Raises EnteringFailed, RequestFailed,
        DescriptorsLost, OSError.
        """
        if message["call"] == "exec" and message.get("group") is not None:
            spawner = self._spawner(str(message["name"]))
            if spawner is not None and len(fds) == DESCRIPTOR_COUNT:
                group = Path(message["group"])
                spawner.waiting.append(
                    Job(int(message["id"]), message, group, fds.copy(), os.dup(fds[0]))
                )
                fds.clear()  # They are the job's now.
                self._start_next(spawner)
                return None
        return self._enter(message, fds)

    def _enter(self, message: Mapping[str, Any], fds: list[int]) -> dict[str, Any]:
        """Put a process into a container without a spawner."""
        name = str(message["name"])
        group = Path(message["group"]) if message.get("group") is not None else None
        gate_out, gate_in = os.pipe()
        try:
            action = _prepare_action(message, fds, gate_out)
            pid, inside = enter(self._doorway(name), self.confinement, group, action)
            self._watch(int(message["id"]), pid)
            os.write(gate_in, _GO)
        except (EnteringFailed, OSError):
            # The container may have exited; if not, the next request finds it again.
            self._close_doorway(name)
            raise
        finally:
            os.close(gate_out)
            os.close(gate_in)
        return {"pid": pid, "pid_inside": inside}

    def supervise(self, message: Mapping[str, Any], fds: list[int]) -> dict[str, Any]:
        """Start a command with a supervisor of its own, which answers by itself.

        Raises EnteringFailed, DescriptorsLost, OSError.
        """
        if len(fds) not in supervisor.DESCRIPTOR_COUNTS:
            raise DescriptorsLost("The launcher has no room for descriptors.")
        supervisor.fork(self._doorway(str(message["name"])), self.confinement, message, fds)
        return {}

    def _doorway(self, name: str) -> Doorway:
        if name not in self.doorways:
            self.doorways[name] = Doorway.find(name)
        return self.doorways[name]

    def _close_doorway(self, name: str) -> None:
        doorway = self.doorways.pop(name, None)
        if doorway is not None:
            doorway.close()

    def forget(self, name: str) -> None:
        """Give up everything held of a container, and wait until it is given up."""
        if name in self.spawners:
            self._end_spawner(self.spawners[name])
        self._close_doorway(name)

    def _watch(self, request: int, pid: int, spawner: Spawner | None = None) -> None:
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            os.kill(pid, signal.SIGKILL)
            raise
        self.attached[pidfd] = Attached(request, pid, pidfd, spawner)
        # A spawner reports what becomes of its children, mostly (_report_held).
        if spawner is None:
            self.poller.register(pidfd, select.POLLIN)

    def reap(self) -> None:
        """Reap every child that has exited, whoever created it.

        A command can be a child of this process, and so can create more of them (CLONE_PARENT in
        clone(2)).  One that is never reaped would keep its container from ever exiting
        (pid_namespaces(7)).
        """
        by_pid = {process.pid: process for process in self.attached.values()}
        spawners = {spawner.pid: spawner for spawner in self.spawners.values()}
        with contextlib.suppress(ChildProcessError):
            while (reaped := os.waitpid(-1, os.WNOHANG))[0]:
                pid, status = reaped
                # A command can make its parent its tracer, who is also told when it stops.
                if os.WIFSTOPPED(status):
                    continue
                if pid in by_pid:
                    self._report(by_pid[pid], status)
                elif pid in spawners:
                    # Its pid can be another process's from now on.
                    while self._serve_spawner(spawners[pid]):
                        pass

    def _report_exit(self, pidfd: int) -> None:
        self.reap()
        # Not there any more if that has reported it.
        if (process := self.attached.get(pidfd)) is not None:
            self._report_held(process)

    def _report_held(self, process: Attached) -> None:
        """Report a process that has exited although its parent cannot reap it.

        A traced process is reaped by its tracer first, which may take forever (ptrace(2)).
        """
        # If it fails, its spawner has reaped it, and will say so; or another attempt follows.
        with contextlib.suppress(OSError):
            status = kernel.exit_status(process.pid)
            # In that case it may have been another process, too.
            signal.pidfd_send_signal(process.pidfd, 0)
            # Also None if another process got the descriptor of one that was reaped just now.
            if status is not None:
                self._report(process, status)

    def _report(self, process: Attached, status: int) -> None:
        del self.attached[process.pidfd]
        if process.spawner is None:
            self.poller.unregister(process.pidfd)
        else:
            process.spawner.running -= 1
            process.spawner.since = time.monotonic()
        os.close(process.pidfd)
        self.send({"exit": process.request, "status": status})

    def signal(self, target: int, number: int) -> None:
        """Signal the process of a request, if it has not exited."""
        for process in self.attached.values():
            if process.request == target:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(process.pidfd, number)

    # Spawners ------------------------------------------------------------------------------

    def _spawner(self, name: str) -> Spawner | None:
        """The spawner in a container, a new one if necessary; None if it has to do without."""
        spawner = self.spawners.pop(name, None)
        if spawner is not None:
            self.spawners[name] = spawner  # Now the most recently used one.
            return None if spawner.is_stuck else spawner
        if len(self.spawners) >= _MAX_SPAWNERS and not self._end_least_used():
            return None
        try:
            spawner = Spawner.fork(name, self._doorway(name), self.confinement)
        except (EnteringFailed, OSError):
            self._close_doorway(name)
            return None
        self.spawners[name] = self.spawners_by_fd[spawner.sock.fileno()] = spawner
        self.poller.register(spawner.sock, select.POLLIN)
        return spawner

    def _end_least_used(self) -> bool:
        idle = next((spawner for spawner in self.spawners.values() if spawner.is_idle), None)
        if idle is not None:
            self._end_spawner(idle)
        return idle is not None

    def _serve_spawner(self, spawner: Spawner) -> bool:
        """Handle one event; False if there is none, or was the last one."""
        match spawner.receive():
            case Entered():
                spawner.entered = True
                self._start_next(spawner)
            case Spawned(pid):
                self._command_started(spawner, pid)
                spawner.early = None
                spawner.acknowledge()
                self._start_next(spawner)
            case Refused():
                self._command_refused(spawner)
                self._start_next(spawner)
            case Exited(pid, status):
                mine = (each for each in self.attached.values() if each.pid == pid)
                process = next((each for each in mine if each.spawner is spawner), None)
                if process is not None:
                    self._report(process, status)
            case Ended():
                self._end_spawner(spawner)
                return False
            case None:
                return False
        return True

    def _start_next(self, spawner: Spawner) -> None:
        while spawner.is_ready and spawner.waiting:
            job = spawner.waiting.popleft()
            try:
                spawner.start(job)
            except (OSError, KeyError, TypeError, ValueError):
                self._start_otherwise(job)

    def _start_otherwise(self, job: Job) -> None:
        """Start a command that has not been started, and was not handed over, without a spawner."""
        try:
            answer = self._enter(job.message, job.fds)
        except (*EXPECTED_ERRORS, OSError, KeyError, TypeError, ValueError) as error:
            answer = error_answer(error)
        finally:
            job.close()
        self.send({"id": job.request, **answer})

    def _command_started(self, spawner: Spawner, pid: int) -> None:
        """Respond that the current command runs, unless that was done early."""
        job, spawner.current = spawner.current, None
        if job is None:
            return
        job.close()
        try:
            inside = pid_inside(pid)
            self._watch(job.request, pid, spawner)
            spawner.running += 1
            answer: dict[str, Any] = {"pid": pid, "pid_inside": inside}
        except OSError as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        spawner.leave()
        self.send({"id": job.request, **answer})

    def _command_refused(self, spawner: Spawner) -> None:
        """Start the current command otherwise, or say that it has ended if it was answered early.

        Somebody inside had stopped that one before it could become the command, and let it go on;
        its spawner has reaped it without a word (posix_spawn(3)).
        """
        spawner.leave()
        job, spawner.current = spawner.current, None
        early, spawner.early = spawner.early, None
        if job is not None:
            self._start_otherwise(job)
            return
        mine = (each for each in self.attached.values() if each.pid == early)
        process = next((each for each in mine if each.spawner is spawner), None)
        if process is not None:
            self._report(process, NOT_STARTED)

    def check(self) -> float | None:
        """Let nobody wait for a spawner that hangs, and end those that nobody needs.

        Returns in how many seconds it has to be called again, None if not before the next event.
        """
        if self.spawners and time.monotonic() >= self.next_check:
            self.next_check = time.monotonic() + _CHECK_SECONDS
            self._check_now()
        return _CHECK_SECONDS if self.spawners else None

    def _check_now(self) -> None:
        for process in [each for each in self.attached.values() if each.spawner is not None]:
            if has_exited(process.pidfd):
                self._report_held(process)
        for spawner in list(self.spawners.values()):
            if spawner.is_stuck:
                child = spawner.find_child()
                if child is not None:
                    self._command_started(spawner, child)
                    spawner.early = child
                while spawner.waiting:
                    self._start_otherwise(spawner.waiting.popleft())
                if spawner.is_hopeless:
                    self._end_spawner(spawner)
            elif spawner.is_expired:
                self._end_spawner(spawner)

    def _end_spawner(self, spawner: Spawner) -> None:
        """End a spawner, and all that depends on it: what it was starting, and what it started."""
        del self.spawners[spawner.name], self.spawners_by_fd[spawner.sock.fileno()]
        self.poller.unregister(spawner.sock)
        spawner.end()
        for process in [each for each in self.attached.values() if each.spawner is spawner]:
            # Nobody could tell how it ends: its parent is somebody else now.
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(process.pidfd, signal.SIGKILL)
            self._report(process, signal.SIGKILL)
        if spawner.current is not None:
            # It may have run: it must not be started again.
            spawner.current.close()
            answer = error_answer(EnteringFailed("The process was killed as it entered."))
            self.send({"id": spawner.current.request, **answer})
        while spawner.waiting:
            self._start_otherwise(spawner.waiting.popleft())


def _prepare_action(
    message: Mapping[str, Any], fds: list[int], gate: int
) -> Callable[[], NoReturn]:
    """What the attached process will do, with everything it needs prepared."""
    if len(fds) != _DESCRIPTOR_COUNTS[message["call"]]:
        raise DescriptorsLost("The launcher has no room for descriptors.")
    if message["call"] == "exec":
        stdin, stdout, stderr, status = fds
        command = Command(
            argv=[str(word) for word in message["argv"]],
            cwd=str(message["cwd"]),
            env={str(key): str(value) for key, value in message["env"].items()},
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            gate=gate,
            status=status,
        )
        return lambda: become_command(command)
    operation, arguments = str(message["operation"]), dict(message["arguments"])
    if operation not in inside_files.OPERATIONS:
        raise RequestFailed(f"There is no file operation called {operation!r}.")
    (peer,) = fds
    return lambda: inside_files.serve(operation, arguments, peer, gate)


def error_answer(error: Exception) -> dict[str, Any]:
    """The response to a failed request; ``at_limit`` means that a limit of the host was hit."""
    message = (
        str(error) if isinstance(error, EXPECTED_ERRORS) else f"{type(error).__name__}: {error}"
    )
    return {"error": message, "at_limit": getattr(error, "errno", None) in _HOST_LIMIT_ERRNOS}
