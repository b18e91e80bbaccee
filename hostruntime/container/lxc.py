"""The launcher: a small single-threaded process, the only one that imports ``lxc``.

Started by the agent as ``python -m hostruntime.container.lxc <descriptor>``, it serves requests on
that socket (:mod:`hostruntime.container.channel`) until the agent closes it:

``start``   mount a root file system and start a container on it → ``{init_pid}``
``attach``  put a process into a container (:mod:`hostruntime.container.entering`) and run it →
            ``{pid, pid_inside}``, and an ``exit`` message when it has exited
``signal``  signal an attached process

It is a separate process because python-lxc holds the GIL while it waits, and entering a container
requires a single-threaded process.  A start forks once more because LXC moves the process that
starts a container into the control group of that container's monitor permanently; this also lets
the launcher serve other requests meanwhile.  LXC's monitors are daemons and outlive the launcher.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import lxc

from hostruntime.container import channel, inside_files, seccomp
from hostruntime.container.config import user_namespace_items
from hostruntime.container.entering import Confinement, Doorway, EnteringFailed, enter
from hostruntime.container.inside_exec import Command, become_command
from hostruntime.container.rootfs import (
    RootfsPlan,
    container_extents,
    id_extents,
    mount_rootfs,
    unmount_rootfs,
)
from hostruntime.host import kernel

_TITLE = "orkestr hostruntime.container.lxc"
_OPEN_FILES = 65_536
_OOM_SCORE_ADJ = 300
_LOG_TAIL_BYTES = 1500
_GO = b"1"
_SIGNAL_READ_BYTES = 4096
# The number of descriptors in a request to attach, by call.
_DESCRIPTOR_COUNTS = {"exec": 4, "file": 1}


# Errors that mean that the host or this process is at a limit, and never the container: a process
# is charged to the container's limits only at the end.
_HOST_LIMIT_ERRNOS = frozenset({errno.EMFILE, errno.ENFILE, errno.EAGAIN})


class RequestFailed(Exception):  # noqa: N818 - an answer to the agent
    """A request that failed; the text is sent to the agent."""


class DescriptorsLost(Exception):  # noqa: N818 - an answer to the agent
    """The descriptors of a request could not be received (MSG_CTRUNC in recv(2))."""

    errno = errno.EMFILE


_EXPECTED_ERRORS = (RequestFailed, EnteringFailed, DescriptorsLost)


@dataclass
class _Attached:
    request: int
    pid: int
    pidfd: int


@dataclass
class _Starting:
    request: int
    result: bytes = b""


@dataclass
class Launcher:
    """The state of one launcher process; the dictionaries are keyed by polled descriptors."""

    sock: socket.socket
    lxcpath: str
    confinement: Confinement
    child_signals: int = field(default_factory=lambda: kernel.create_signalfd(signal.SIGCHLD))
    poller: select.poll = field(default_factory=select.poll)
    attached: dict[int, _Attached] = field(default_factory=dict)
    starting: dict[int, _Starting] = field(default_factory=dict)
    doorways: dict[str, Doorway] = field(default_factory=dict)

    def run(self) -> None:
        """Serve until the agent disconnects, then kill what it can no longer watch."""
        self.poller.register(self.sock, select.POLLIN)
        self.poller.register(self.child_signals, select.POLLIN)
        try:
            while True:
                for fd, _ in self.poller.poll():
                    if fd == self.sock.fileno():
                        self._serve_one()
                    elif fd == self.child_signals:
                        os.read(self.child_signals, _SIGNAL_READ_BYTES)
                        self._reap()
                    elif fd in self.starting:
                        self._report_start(fd)
                    elif fd in self.attached:
                        self._report_exit(fd)
        except channel.ChannelClosed:
            for process in self.attached.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)

    def _serve_one(self) -> None:
        message, fds = channel.receive(self.sock)
        request = message.get("id")
        try:
            answer = self._dispatch(message, fds)
        except (*_EXPECTED_ERRORS, OSError, KeyError, TypeError, ValueError) as error:
            answer = _error_answer(error)
        finally:
            for fd in fds:
                os.close(fd)
        if answer is not None:
            channel.send(self.sock, {"id": request, **answer})

    def _dispatch(self, message: Mapping[str, Any], fds: list[int]) -> dict[str, Any] | None:
        match message["do"]:
            case "start":
                self._fork_start(message)
                return None  # The response is sent when the start has finished.
            case "attach":
                return self._attach(message, fds)
            case "signal":
                return self._signal(int(message["target"]), int(message["signal"]))
            case "forget":
                self._forget(str(message["name"]))
                return {}
        raise RequestFailed(f"There is no request called {message['do']!r}.")

    # Starting ------------------------------------------------------------------------------

    def _fork_start(self, message: Mapping[str, Any]) -> None:
        plan = _rootfs_plan(message["rootfs"])
        result_out, result_in = os.pipe()
        try:
            pid = os.fork()
            if pid == 0:
                self._start_and_exit(message, plan, result_in)
        except OSError:
            os.close(result_out)
            raise
        finally:
            os.close(result_in)
        self.starting[result_out] = _Starting(int(message["id"]))
        self.poller.register(result_out, select.POLLIN)

    def _start_and_exit(
        self, message: Mapping[str, Any], plan: RootfsPlan, result: int
    ) -> NoReturn:
        _close_all_but(result)
        # LXC waits for children, and init inherits the blocked signals.
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        try:
            answer: dict[str, Any] = {"init_pid": self._start(message, plan)}
        except Exception as error:  # noqa: BLE001 - any error is reported to the agent
            answer = _error_answer(error)
        try:
            os.write(result, json.dumps(answer).encode())
        finally:
            os._exit(0)

    def _start(self, message: Mapping[str, Any], plan: RootfsPlan) -> int:
        # Init configures itself through its own /proc entries; nobody else is inside yet.
        kernel.set_dumpable(dumpable=True)
        mount_rootfs(plan, kernel.create_user_namespace(id_extents(plan.id_base)))
        try:
            # Created by the container's own root, so that its usage is charged to nobody else.
            userns_fd = kernel.create_user_namespace(container_extents(plan.id_base), plan.id_base)
            items = [*message["config"], *user_namespace_items(userns_fd)]
            container = self._configure(str(message["name"]), items)
            # close_fds: the monitor, a daemon, must not keep the agent's socket open.
            if not container.start(close_fds=True, daemonize=True):
                log_tail = _tail(Path(message["log"]))
                raise RequestFailed(f"LXC did not start the container. {log_tail}".strip())
            return int(container.init_pid)
        except BaseException:
            unmount_rootfs(plan.mounts)
            raise

    def _report_start(self, fd: int) -> None:
        starting = self.starting[fd]
        if data := os.read(fd, 65_536):
            starting.result += data
            return
        self.poller.unregister(fd)
        os.close(fd)
        del self.starting[fd]
        answer = {"error": "The process that was starting the container died."}
        if starting.result:
            answer = json.loads(starting.result)
        channel.send(self.sock, {"id": starting.request, **answer})

    def _configure(self, name: str, items: Sequence[Sequence[str]]) -> lxc.Container:
        container = lxc.Container(name, self.lxcpath)
        for key, value in items:
            # Not set_config_item, which keeps only the last value of a repeated key.
            if not container.append_config_item(key, value):
                raise RequestFailed(f"LXC refused the configuration {key} = {value}.")
        return container

    # Attaching -----------------------------------------------------------------------------

    def _attach(self, message: Mapping[str, Any], fds: list[int]) -> dict[str, Any]:
        name = str(message["name"])
        group = Path(message["group"]) if message.get("group") is not None else None
        gate_out, gate_in = os.pipe()
        try:
            action = _prepare_action(message, fds, gate_out)
            pid, pid_inside = enter(self._doorway(name), self.confinement, group, action)
            self._watch(int(message["id"]), pid)
            os.write(gate_in, _GO)
        except (EnteringFailed, OSError):
            # The container may have exited; if not, the next request finds it again.
            self._forget(name)
            raise
        finally:
            os.close(gate_out)
            os.close(gate_in)
        return {"pid": pid, "pid_inside": pid_inside}

    def _doorway(self, name: str) -> Doorway:
        if name not in self.doorways:
            self.doorways[name] = Doorway.find(name)
        return self.doorways[name]

    def _forget(self, name: str) -> None:
        doorway = self.doorways.pop(name, None)
        if doorway is not None:
            doorway.close()

    def _watch(self, request: int, pid: int) -> None:
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
        self.attached[pidfd] = _Attached(request, pid, pidfd)
        self.poller.register(pidfd, select.POLLIN)

    def _reap(self) -> None:
        """Reap every child that has exited, whoever created it.

        A command is a child of this process, and so can create more of them (CLONE_PARENT in
        clone(2)).  One that is never reaped would keep its container from ever exiting
        (pid_namespaces(7)).
        """
        by_pid = {process.pid: process for process in self.attached.values()}
        with contextlib.suppress(ChildProcessError):
            while (reaped := os.waitpid(-1, os.WNOHANG))[0]:
                pid, status = reaped
                if pid in by_pid:
                    self._report(by_pid[pid], status)

    def _report_exit(self, pidfd: int) -> None:
        self._reap()
        # A traced process is reaped by its tracer first, which may take forever (ptrace(2)).
        process = self.attached.get(pidfd)
        status = kernel.exit_status(process.pid) if process is not None else None
        # Also None if another process got the descriptor of one that was reaped just now.
        if process is not None and status is not None:
            self._report(process, status)

    def _report(self, process: _Attached, status: int) -> None:
        del self.attached[process.pidfd]
        self.poller.unregister(process.pidfd)
        os.close(process.pidfd)
        channel.send(self.sock, {"exit": process.request, "status": status})

    def _signal(self, target: int, number: int) -> dict[str, Any]:
        for process in self.attached.values():
            if process.request == target:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(process.pidfd, number)
        return {}


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


def _close_all_but(*keep: int) -> None:
    """Close what a start does not need: LXC's monitor closes the rest, one by one."""
    first = 3
    for number in sorted(keep):
        os.closerange(first, number)
        first = number + 1
    os.closerange(first, 1 << 30)


def _rootfs_plan(fields: Mapping[str, Any]) -> RootfsPlan:
    return RootfsPlan(
        mounts=Path(fields["mounts"]),
        image_tree=Path(fields["image_tree"]),
        runtime_tree=Path(fields["runtime_tree"]),
        writable=Path(fields["writable"]),
        sysfs=Path(fields["sysfs"]) if fields.get("sysfs") else None,
        id_base=int(fields["id_base"]),
    )


def _error_answer(error: Exception) -> dict[str, Any]:
    """The response to a failed request; ``at_limit`` means that a limit of the host was hit."""
    message = (
        str(error) if isinstance(error, _EXPECTED_ERRORS) else f"{type(error).__name__}: {error}"
    )
    return {"error": message, "at_limit": getattr(error, "errno", None) in _HOST_LIMIT_ERRNOS}


def _tail(log: Path) -> str:
    try:
        text = log.read_text(errors="replace")[-_LOG_TAIL_BYTES:].strip()
    except OSError:
        return ""
    return f"Its log ends: {text}" if text else ""


def _prepare_process() -> None:
    # If LXC cannot find newuidmap it writes the id maps itself, as root may: two programs fewer.
    os.environ.clear()
    os.environ["PATH"] = "/nonexistent"
    # An attached process shows this until it becomes the command: it must not show host paths.
    kernel.set_command_line(_TITLE)
    # Inherited by init and attached processes; nobody inside can raise a hard limit, which requires
    # a capability in the initial user namespace (getrlimit(2)).
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(_OPEN_FILES, hard_limit),) * 2)
    # When the machine runs out of memory, processes in containers are killed before the services;
    # as root sets it, nobody inside can lower it (proc(5)).
    with contextlib.suppress(PermissionError):
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE_ADJ))
    # Core dumps would go where the host's core_pattern says, which may be a program on the host.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # An attached process starts with this memory image, and for a moment with credentials that
    # container root controls: this memory must not be readable then (ptrace(2)).
    kernel.set_dumpable(dumpable=False)
    # The launcher exits when its socket is closed; ignore a Ctrl-C in the agent's terminal.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def main() -> None:
    """Serve; arguments: a socket's descriptor, lxcpath, and optionally an AppArmor profile."""
    _prepare_process()
    descriptor, lxcpath, *labels = sys.argv[1:]
    confinement = Confinement.of(seccomp.program(), labels[0] if labels else None)
    with socket.socket(fileno=int(descriptor)) as sock:
        os.set_inheritable(sock.fileno(), False)  # noqa: FBT003 - positional-only
        Launcher(sock, lxcpath, confinement).run()


if __name__ == "__main__":
    main()
