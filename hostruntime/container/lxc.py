"""The launcher: a small single-threaded process, the only one that imports ``lxc``.

Started by the agent as ``python -m hostruntime.container.lxc <descriptor>``, it serves requests on
that socket (:mod:`hostruntime.host.channel`) until the agent closes it:

``start``   mount a root file system and start a container on it → ``{init_pid}``
``attach``  put a process into a container and run it → ``{pid, pid_inside}``, and an ``exit``
            message when it has exited.  Commands are started by the container's spawner
            (:mod:`hostruntime.container.spawner`); everything else, and what a spawner cannot
            start, by this process (:mod:`hostruntime.container.entering`)
``supervise`` start a command with a process of its own on the host that looks after it, and
            outlives this one (:mod:`hostruntime.container.supervisor`)
``prepare`` have a spawner in a container, so that its next command starts sooner
``signal``  signal an attached process
``forget``  give up everything held of a container

It is a separate process because python-lxc holds the GIL while it waits, and entering a container
requires a single-threaded process.  A start forks once more, so that the launcher serves other
requests meanwhile, and has LXC's own program start the container
(:mod:`hostruntime.container.lxc_start`).  LXC's monitors are daemons and outlive the launcher.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import lxc

from hostruntime.container import lxc_start, seccomp
from hostruntime.container.attaching import (
    EXPECTED_ERRORS,
    Attachments,
    RequestFailed,
    error_answer,
)
from hostruntime.container.cgroups import cgroup_layout
from hostruntime.container.config import user_namespace_items
from hostruntime.container.entering import Confinement
from hostruntime.container.mount_view import MountView
from hostruntime.container.rootfs import (
    RootfsPlan,
    container_extents,
    id_extents,
    mount_rootfs,
    unmount_rootfs,
)
from hostruntime.host import channel, kernel

_TITLE = "orkestr hostruntime.container.lxc"
_OPEN_FILES = 65_536
_OOM_SCORE_ADJ = 300
_LOG_TAIL_BYTES = 1500
# For what nobody waits for (nice(2)).
_BACKGROUND_NICE = 10
_SIGNAL_READ_BYTES = 4096


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
    lxc_start: int
    mounts: MountView
    child_signals: int = field(default_factory=lambda: kernel.create_signalfd(signal.SIGCHLD))
    poller: select.poll = field(default_factory=select.poll)
    starting: dict[int, _Starting] = field(default_factory=dict)
    attachments: Attachments = field(init=False)

    def __post_init__(self) -> None:
        self.attachments = Attachments(
            self.confinement, self.poller, partial(channel.send, self.sock)
        )

    def run(self) -> None:
        """Serve until the agent disconnects, then kill what it can no longer watch."""
        self.poller.register(self.sock, select.POLLIN)
        self.poller.register(self.child_signals, select.POLLIN)
        try:
            while True:
                seconds = self.attachments.check()
                for fd, _ in self.poller.poll(None if seconds is None else seconds * 1000):
                    self._handle(fd)
        except channel.ChannelClosed:
            self.attachments.kill()

    def _handle(self, fd: int) -> None:
        if fd == self.sock.fileno():
            self._serve_one()
        elif fd == self.child_signals:
            os.read(self.child_signals, _SIGNAL_READ_BYTES)
            self.attachments.reap()
        elif not self.attachments.handle(fd) and fd in self.starting:
            self._report_start(fd)

    def _serve_one(self) -> None:
        message, fds = channel.receive(self.sock)
        request = message.get("id")
        try:
            answer = self._dispatch(message, fds)
        except (*EXPECTED_ERRORS, OSError, KeyError, TypeError, ValueError) as error:
            answer = error_answer(error)
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
                return self.attachments.attach(message, fds)
            case "supervise":
                return self.attachments.supervise(message, fds)
            case "signal":
                self.attachments.signal(int(message["target"]), int(message["signal"]))
                return {}
            case "prepare":
                self.attachments.prepare(str(message["name"]), float(message["seconds"]))
                return {}
            case "forget":
                self.attachments.forget(str(message["name"]))
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
        os.set_blocking(result_out, False)
        self.starting[result_out] = _Starting(int(message["id"]))
        self.poller.register(result_out, select.POLLIN)

    def _start_and_exit(
        self, message: Mapping[str, Any], plan: RootfsPlan, result: int
    ) -> NoReturn:
        _close_all_but(result, self.lxc_start, self.mounts.host)
        # A collection would write to every page that is still shared with the launcher.
        gc.disable()
        # LXC waits for children, and init inherits the blocked signals.
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        try:
            answer: dict[str, Any] = {"init_pid": self._start(message, plan)}
        except Exception as error:  # noqa: BLE001 - any error is reported to the agent
            answer = error_answer(error)
        try:
            os.write(result, json.dumps(answer).encode())
        finally:
            os._exit(0)

    def _start(self, message: Mapping[str, Any], plan: RootfsPlan) -> int:
        if message.get("background"):
            os.nice(_BACKGROUND_NICE)
        # Init configures itself through its own /proc entries; nobody else is inside yet.
        kernel.set_dumpable(dumpable=True)
        self.mounts.enter_for(plan, _network_namespace(message["config"]))
        mount_rootfs(plan, kernel.create_user_namespace(id_extents(plan.id_base)))
        try:
            # Created by the container's own root, so that its usage is charged to nobody else.
            userns_fd = kernel.create_user_namespace(container_extents(plan.id_base), plan.id_base)
            items = [*message["config"], *user_namespace_items(userns_fd)]
            container = self._configure(str(message["name"]), items)
            if not lxc_start.start(self.lxc_start, container):
                log_tail = _tail(Path(message["log"]))
                raise RequestFailed(f"LXC did not start the container. {log_tail}".strip())
            init = int(container.init_pid)
            # It and its monitor are like any others from now on.
            for pid in (init, kernel.parent_of(init)):
                os.setpriority(os.PRIO_PROCESS, pid or init, 0)
            return init
        except BaseException:
            unmount_rootfs(plan.mounts)
            raise

    def _configure(self, name: str, items: Sequence[Sequence[str]]) -> lxc.Container:
        container = lxc.Container(name, self.lxcpath)
        for key, value in items:
            # Not set_config_item, which keeps only the last value of a repeated key.
            if "\n" in value or not container.append_config_item(key, value):
                raise RequestFailed(f"LXC refused the configuration {key} = {value}.")
        return container

    def _report_start(self, fd: int) -> None:
        starting = self.starting[fd]
        try:
            data = os.read(fd, 65_536)
        except BlockingIOError:
            return  # The event was for what had this descriptor before.
        if data:
            starting.result += data
            return
        self.poller.unregister(fd)
        os.close(fd)
        del self.starting[fd]
        answer = {"error": "The process that was starting the container died."}
        if starting.result:
            answer = json.loads(starting.result)
        channel.send(self.sock, {"id": starting.request, **answer})

    # Attaching -----------------------------------------------------------------------------


def _close_all_but(*keep: int) -> None:
    """Close what a start does not need."""
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
        volume=Path(fields["volume"]) if fields.get("volume") else None,
        figures=Path(fields["figures"]) if fields.get("figures") else None,
    )


def _network_namespace(config: Sequence[Sequence[str]]) -> Path | None:
    """Where a container's network namespace is mounted, by its configuration."""
    paths = (Path(value) for key, value in config if key == "lxc.namespace.share.net")
    return next(paths, None)


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
        mounts = MountView.enter(Path(lxcpath).parent, cgroup_layout().unused())
        Launcher(sock, lxcpath, confinement, lxc_start.copy_program(), mounts).run()


if __name__ == "__main__":
    main()
