"""One of two containers: leaves traces of itself, or looks for the other's.

``leave`` makes everything that a name or a number could lead to, says so, and waits for the end
of its standard input's stand-in: the file ``/workspace/stop``.  ``look`` says what it finds.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import sys
import time
from pathlib import Path

from tests.host.attacks.harness import check, libc

NAME = "neighbour"
KEY = 0x6F726B
IPC_CREAT = 0o1000
PORT = 45_123
FILES = [f"{place}/{NAME}" for place in ("/dev/shm", "/tmp", "/workspace", "/root", "/run")]


def queue(flags: int) -> int:
    """POSIX message queue by name (mq_open(3))."""
    return int(libc.mq_open(f"/{NAME}".encode(), flags, 0o666, None))


def leave() -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"\0{NAME}")
    listener.listen()
    tcp = socket.create_server(("127.0.0.1", PORT))
    shared = check(libc.shmget(KEY, 4096, IPC_CREAT | 0o666))
    semaphores = check(libc.semget(KEY, 1, IPC_CREAT | 0o666))
    messages = check(libc.msgget(KEY, IPC_CREAT | 0o666))
    named = check(queue(os.O_CREAT | os.O_RDWR))
    for path in FILES:
        Path(path).write_text("here")
    assert "here" in Path(FILES[0]).read_text()
    made = [shared, semaphores, messages, named, listener.fileno(), tcp.fileno()]
    print(json.dumps({"made": made, "found": look()}), flush=True)
    Path("/workspace/ready").touch()
    while not Path("/workspace/stop").exists():
        time.sleep(0.05)


def look() -> list[str]:
    """What of the things that :func:`leave` makes is to be found from here."""
    found = [path for path in FILES if Path(path).exists()]
    with socket.socket(socket.AF_UNIX) as attempt:
        if attempt.connect_ex(f"\0{NAME}") == 0:
            found.append("abstract socket")
    if NAME in Path("/proc/net/unix").read_text():
        found.append("abstract socket's name")
    with socket.socket() as tcp:
        if tcp.connect_ex(("127.0.0.1", PORT)) == 0:
            found.append("port")
    if libc.shmget(KEY, 4096, 0) != -1:
        found.append("shared memory")
    if libc.semget(KEY, 1, 0) != -1:
        found.append("semaphores")
    if libc.msgget(KEY, 0) != -1:
        found.append("messages")
    if queue(os.O_RDWR) != -1:
        found.append("message queue")
    for kind in ("shm", "sem", "msg"):
        if len(Path(f"/proc/sysvipc/{kind}").read_text().splitlines()) > 1:
            found.append(f"/proc/sysvipc/{kind}")
    lines = b"".join(map(readable, Path("/proc").glob("[0-9]*/cmdline")))
    if b"attacks.neighbour\0leave" in lines:
        found.append("command line")
    environments = b""
    for path in Path("/proc").glob("[0-9]*/environ"):
        if path.parent.name != str(os.getpid()):
            environments += readable(path)
    if b"NEIGHBOURS_SECRET" in environments:
        found.append("environment")
    return found


def readable(path: Path) -> bytes:
    """What a process shows; nothing, if it has ended or is one that the agent just attached."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


if __name__ == "__main__":
    ctypes.set_errno(0)
    if sys.argv[1] == "leave":
        leave()
    else:
        print(json.dumps(look()))
