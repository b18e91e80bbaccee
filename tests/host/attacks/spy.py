"""Watches for processes that the host puts into the container, and tries to get hold of each.

Such a process shows the launcher's command line until it has become a command or has done its
file operation.  What is tried only counts while it does, so that line is read before and after.
Runs for the number of seconds that the first argument gives, then says what it saw, as JSON.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable

from tests.host.attacks.harness import number, syscall

PTRACE_SEIZE, PTRACE = 0x4206, number(101, 117)


def launcher(pid: int) -> bool:
    """Whether it still is what the host attached."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().startswith(b"orkestr ")
    except OSError:
        return False


def write_program(pid: int) -> None:
    with open(f"/proc/{pid}/exe", "r+b", buffering=0) as file:
        file.write(b"owned")


def take_descriptor(pid: int) -> None:
    pidfd = syscall(434, pid, 0)
    try:
        syscall(438, pidfd, 3, 0)
    finally:
        os.close(pidfd)


def trace(pid: int) -> None:
    """Trace it from a process that ends at once: an ended tracer lets go of what it has."""
    tracer = os.fork()
    if tracer == 0:
        try:
            syscall(PTRACE, PTRACE_SEIZE, pid, 0, 0)
        except OSError as error:
            os._exit(error.errno or 0)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(tracer, 0)[1])
    if code:
        raise OSError(code, os.strerror(code))


def read_text(path: str) -> None:
    with open(path, "rb") as file:
        file.read()


ATTEMPTS: dict[str, Callable[[int], object]] = {
    "overwrite its program": write_program,
    "read its program": lambda pid: os.close(os.open(f"/proc/{pid}/exe", os.O_RDONLY)),
    "learn its program's path": lambda pid: os.readlink(f"/proc/{pid}/exe"),
    "list its descriptors": lambda pid: os.listdir(f"/proc/{pid}/fd"),
    "take a descriptor": lambda pid: os.close(os.open(f"/proc/{pid}/fd/3", os.O_RDWR)),
    "take a descriptor by pidfd": take_descriptor,
    "open its memory": lambda pid: os.close(os.open(f"/proc/{pid}/mem", os.O_RDWR)),
    "read its maps": lambda pid: read_text(f"/proc/{pid}/maps"),
    "read its environment": lambda pid: read_text(f"/proc/{pid}/environ"),
    "trace it": trace,
    "enter its root": lambda pid: os.listdir(f"/proc/{pid}/root"),
    "enter its directory": lambda pid: os.listdir(f"/proc/{pid}/cwd"),
}


def what_works_on_its_own() -> list[str]:
    """The control: what can be done to a process of the container's own."""
    os.dup2(os.open("/dev/null", os.O_RDWR), 3)
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    done = []
    for what, attempt in ATTEMPTS.items():
        with contextlib.suppress(OSError):
            attempt(child)
            done.append(what)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return done


def main() -> None:
    own = what_works_on_its_own()
    until = time.monotonic() + float(sys.argv[1])
    seen: set[int] = set()
    refused: Counter[str] = Counter()
    succeeded: Counter[str] = Counter()
    while time.monotonic() < until:
        for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
            if pid == os.getpid() or not launcher(pid):
                continue
            seen.add(pid)
            for what, attempt in ATTEMPTS.items():
                try:
                    attempt(pid)
                except OSError as error:
                    result = refused if error.errno in (errno.EACCES, errno.EPERM) else None
                else:
                    result = succeeded
                if result is not None and launcher(pid):
                    result[what] += 1
    print(json.dumps({"own": own, "seen": len(seen), "refused": refused, "succeeded": succeeded}))


if __name__ == "__main__":
    main()
