"""What a spawner does: start commands in one container, for as long as its launcher wants.

Runs in a process that has joined the container's namespaces and is confined like everything in
there, but is not itself in the pid namespace (setns(2): only its children are), so nobody inside
can see, signal or trace it.  As with :mod:`hostruntime.container.inside_exec`, paths already
resolve inside, so nothing may be imported or opened lazily.

The launcher sends one command per datagram, and only once this process is in the command's control
groups, so that the command is born in them.  ``posix_spawn`` shares this process's memory with the
new one until that executes the command (CLONE_VFORK in clone(2)): no page is copied, and nothing of
Python runs in between.  What cannot be started here is refused, and no process of it is left; the
launcher then starts it in its own way, which also says what is wrong with it.
"""

from __future__ import annotations

import array
import json
import os
import select
import socket
import struct
from collections.abc import Mapping
from typing import Any, NoReturn

from hostruntime.container.inside_exec import RESET_SIGNALS, SHELL, candidates

MAX_COMMAND_BYTES = 64 * 1024
DESCRIPTOR_COUNT = 4  # stdin, stdout, stderr, and the one whose end says that the command runs
ACKNOWLEDGED = b"a"
REPLY = struct.Struct("!cii")
ENTERED, STARTED, REFUSED, EXITED = b"e", b"s", b"r", b"x"
_INT_BYTES = array.array("i").itemsize
_SIGNAL_READ_BYTES = 4096


def serve(sock: socket.socket, child_signals: int) -> NoReturn:
    """Serve the launcher at the other end of ``sock`` until it closes it, then exit.

    ``child_signals`` is a signalfd(2) for SIGCHLD.
    """
    buffer = bytearray(MAX_COMMAND_BYTES)
    # The commands that have not been reaped.
    commands: set[int] = set()
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    poller.register(child_signals, select.POLLIN)
    try:
        sock.send(REPLY.pack(ENTERED, 0, 0))
        while True:
            for descriptor, _ in poller.poll():
                if descriptor == child_signals:
                    os.read(child_signals, _SIGNAL_READ_BYTES)
                    _report_exits(sock, commands)
                else:
                    _serve_one(sock, buffer, commands)
    finally:
        os._exit(0)


def _serve_one(sock: socket.socket, buffer: bytearray, commands: set[int]) -> None:
    size, ancillary, _, _ = sock.recvmsg_into(
        [buffer], socket.CMSG_SPACE(DESCRIPTOR_COUNT * _INT_BYTES), socket.MSG_CMSG_CLOEXEC
    )
    if not size:
        os._exit(0)
    descriptors = array.array("i")
    for _, _, payload in ancillary:
        descriptors.frombytes(payload[: len(payload) - len(payload) % _INT_BYTES])
    try:
        pid = _spawn(json.loads(buffer[:size]), descriptors)
    except (OSError, ValueError) as error:
        sock.send(REPLY.pack(REFUSED, 0, getattr(error, "errno", None) or 0))
        return
    finally:
        for each in descriptors:
            os.close(each)
    commands.add(pid)
    sock.send(REPLY.pack(STARTED, pid, 0))
    # Until the launcher has seen the process, it must not be reaped, however short it runs.
    if sock.recv(len(ACKNOWLEDGED)) != ACKNOWLEDGED:
        os._exit(0)


def _spawn(command: Mapping[str, Any], descriptors: array.array[int]) -> int:
    """Start a command; return its pid in the launcher's namespace.  Raises OSError, ValueError."""
    if len(descriptors) != DESCRIPTOR_COUNT:
        raise ValueError("the descriptors did not arrive (MSG_CTRUNC in recv(2))")
    name, *arguments = command["argv"]
    environment = command["env"]
    # The command inherits the working directory; one that was removed must not be kept alive.
    os.chdir(command["cwd"])
    try:
        path = next(filter(os.path.exists, candidates(name, environment)), None)
        if path is None:
            raise FileNotFoundError(name)
        title = path.rpartition("/")[2] if name == SHELL else name
        return os.posix_spawn(
            path,
            [title, *arguments],
            environment,
            file_actions=[(os.POSIX_SPAWN_DUP2, descriptors[n], n) for n in range(3)],
            setsid=True,
            setsigmask=(),
            setsigdef=RESET_SIGNALS,
        )
    finally:
        os.chdir("/")


def _report_exits(sock: socket.socket, commands: set[int]) -> None:
    """Reap every child that has exited, whoever created it, and report those that are commands.

    A command can create more children of its parent (CLONE_PARENT in clone(2)), as many as it
    likes: the launcher, which serves other containers, hears of none.  One that is never reaped
    would keep its container from ever exiting (pid_namespaces(7)).
    """
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        # A command can make its parent its tracer (PTRACE_TRACEME), who is also told when it stops.
        if not os.WIFSTOPPED(status) and pid in commands:
            commands.remove(pid)
            sock.send(REPLY.pack(EXITED, pid, status))
