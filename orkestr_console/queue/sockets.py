"""A queue and an event between processes that a killed process cannot leave locked.

``multiprocessing``'s own keep a lock while one process waits; if that process is killed, every
other one waits for ever. Here the kernel does the handing over: a message on a SOCK_SEQPACKET
socket (unix(7)) goes whole to exactly one of those who wait for it.
"""

from __future__ import annotations

import pickle
import select
import socket
from typing import Any

LARGEST = 256 * 1024  # bytes of one message; the kernel's default send buffer is a little less


class SocketQueue:
    """Small objects, each to exactly one reader. Made before the processes are forked."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def put(self, item: Any) -> None:
        """Add an object, waiting while there is no room. Raises ``OSError`` if it is too large."""
        self._writer.send(pickle.dumps(item))

    def get(self) -> Any:
        """The next object, waiting for one."""
        return pickle.loads(self._reader.recv(LARGEST))  # noqa: S301 - our own processes' words

    def empty(self) -> bool:
        """Whether nothing waits to be read."""
        return not select.select([self._reader], [], [], 0)[0]

    def qsize(self) -> int:
        """1 if something waits, 0 if not: the kernel does not say how much."""
        return 0 if self.empty() else 1

    def close(self) -> None:
        """Nothing to flush: what was put has left this process."""

    def join_thread(self) -> None:
        """Nothing to wait for: there is no thread."""


class SocketEvent:
    """A flag that one process raises and others see, for good."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()

    def set(self) -> None:
        """Raise the flag."""
        self._writer.send(b"\0")

    def is_set(self) -> bool:
        """Whether the flag is up."""
        return self.wait(0)

    def wait(self, timeout: float) -> bool:
        """Wait up to ``timeout`` seconds; whether the flag is up then."""
        return bool(select.select([self._reader], [], [], timeout)[0])
