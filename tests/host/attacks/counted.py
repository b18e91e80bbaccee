"""What the kernel counts for a user or for the whole machine: all of it taken, or one more.

``hoard`` has three users take of everything until it is refused, leaves in ``/workspace/hoarded``
how far they came and what refused them, and keeps it for good.  ``look`` says of each thing whether
one can be had: it is run beside a hoarder, in another container and on the host, there also as
nobody.  Both use the same table, so that whoever looks wants just what was taken.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.host.attacks.harness import check, libc, number, syscall

HOARDED = Path("/workspace/hoarded")
USERS = (0, 1, 2)
TAKEN = "taken"
_SIGNAL = signal.SIGRTMIN + 1
_IPC_CREAT, _IPC_RMID, _SHM_LOCK = 0o1000, 0, 11
_F_SETPIPE_SZ = 1031
_MIB = 1 << 20


def inotify_instance() -> object:
    return check(libc.inotify_init1(os.O_CLOEXEC))


def queued_signal() -> object:
    signal.pthread_sigmask(signal.SIG_BLOCK, [_SIGNAL])
    return check(libc.sigqueue(os.getpid(), _SIGNAL, None))


def timer() -> object:
    made = ctypes.c_void_p()
    return check(libc.timer_create(1, None, ctypes.byref(made)))


def message_queue() -> object:
    name = f"/{os.getpid()}-{time.monotonic_ns()}".encode()
    made = check(libc.mq_open(name, os.O_CREAT | os.O_RDWR, 0o600, None))
    # It is counted for as long as it is open, and nothing is left of it on the host.
    return made, libc.mq_unlink(name)


def locked_memory() -> object:
    """Counted by user, unlike what mlock(2) locks (shmctl(2), SHM_LOCK)."""
    made = check(libc.shmget(0, _MIB, _IPC_CREAT | 0o600))
    try:
        check(libc.shmctl(made, _SHM_LOCK, None))
        libc.shmat.restype = ctypes.c_void_p
        return libc.shmat(made, None, 0)
    finally:
        # It goes with whoever has it attached.
        check(libc.shmctl(made, _IPC_RMID, None))


def large_pipe() -> object:
    ends = os.pipe()
    return ends, fcntl.fcntl(ends[1], _F_SETPIPE_SZ, _MIB)


def terminal() -> object:
    return os.openpty()


def open_file() -> object:
    return os.open("/dev/null", os.O_RDONLY)


def connection() -> object:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.socket()
        client.connect(server.getsockname())
        return client, server.accept()


def asynchronous_io() -> object:
    """One pool for the machine (fs.aio-max-nr), which containers get nothing of."""
    context = ctypes.c_ulong()
    return syscall(number(206, 0), 64, ctypes.byref(context))


def process() -> object:
    pid = os.fork()
    if pid == 0:
        os.closerange(0, 100)
        signal.pause()
        os._exit(0)
    return Process(pid)


@dataclass(frozen=True)
class Process:
    """A child that does nothing."""

    pid: int


# Each with how many one user takes at most, for the machine's sake.
THINGS: dict[str, tuple[Callable[[], object], int]] = {
    "inotify instances": (inotify_instance, 1000),
    # Counted as signals are, which therefore come after.
    "timers": (timer, 1000),
    "queued signals": (queued_signal, 200_000),
    "message queues": (message_queue, 1000),
    "locked memory": (locked_memory, 64),
    "large pipes": (large_pipe, 500),
    "terminals": (terminal, 500),
    "asynchronous I/O": (asynchronous_io, 10),
    "connections": (connection, 500),
    "open files": (open_file, 5000),
    "processes": (process, 2000),
}
# Of these the last user takes all but a few: the host enters by such.
_PROCESSES = "processes"
_ROOM_TO_ENTER = 20
# The errors that say of a thing that there is no more of it for this user.
AT_A_LIMIT = {errno.errorcode[n] for n in (errno.EMFILE, errno.EAGAIN, errno.EPERM, errno.ENOMEM)}
AT_A_LIMIT |= {errno.errorcode[n] for n in (errno.ENOSPC, errno.ENOSYS)}


def take(thing: str, most: int) -> tuple[list[object], str]:
    """As many as can be had; what refused one more, or ``TAKEN``."""
    held: list[object] = []
    try:
        while len(held) < most:
            held.append(THINGS[thing][0]())
    except OSError as error:
        return held, errno.errorcode.get(error.errno or 0, "?")
    return held, TAKEN


def hoard() -> None:
    """Have each user take everything, in turn; all is kept."""
    told: dict[str, list[tuple[int, str]]] = {thing: [] for thing in THINGS}
    for user in USERS:
        out, into = os.pipe()
        if os.fork() == 0:
            _hoard_as(user, into)
        os.close(into)
        with open(out) as said:
            for thing, result in json.loads(said.readline()).items():
                told[thing].append(tuple(result))
    written = HOARDED.with_suffix(".new")
    written.write_text(json.dumps(told))
    written.rename(HOARDED)
    while True:
        time.sleep(600)


def _hoard_as(user: int, into: int) -> None:
    os.setresuid(user, user, user)
    held = {}
    told = {}
    for thing, (_, most) in THINGS.items():
        if thing != _PROCESSES or user == USERS[-1]:
            held[thing], how = take(thing, most)
            told[thing] = (len(held[thing]), how)
    for _ in range(_ROOM_TO_ENTER):
        if held.get(_PROCESSES):
            give_back(held[_PROCESSES].pop())
    os.write(into, json.dumps(told).encode() + b"\n")
    while True:
        time.sleep(600)


def give_back(one: object) -> None:
    """End a process; whatever else there is goes with who took it."""
    if isinstance(one, Process):
        os.kill(one.pid, signal.SIGKILL)
        os.waitpid(one.pid, 0)


def look() -> None:
    """Take one of each."""
    told = {}
    for thing in THINGS:
        held, told[thing] = take(thing, 1)
        for each in held:
            give_back(each)
    print(json.dumps(told))


if __name__ == "__main__":
    {"hoard": hoard, "look": look}[sys.argv[1]]()
