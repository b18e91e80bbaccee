"""A queue and an event between processes that a killed process cannot leave locked.

``multiprocessing``'s own hold a lock while a process waits; if that process is killed, all others
wait for ever. Here the kernel delivers: a message on a SOCK_SEQPACKET socket (unix(7)) goes to
exactly one of the waiting readers.
"""

from __future__ import annotations

import pickle
import select
import socket
from typing import Any

MAX_MESSAGE_BYTES = (
    256 * 1024
)  # bytes of one message; the kernel's default send buffer is a little less


class SocketQueue:
    """A queue of small objects, each for one reader. Create it before forking the processes."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def put(self, item: Any) -> None:
        """Add an object, waiting for room. Raises ``OSError`` if it is too large."""
        self._writer.send(pickle.dumps(item))

    def get(self) -> Any:
        """Wait for the next object."""
        return pickle.loads(self._reader.recv(MAX_MESSAGE_BYTES))  # noqa: S301 - our own processes

    def empty(self) -> bool:
        """Whether no object is waiting."""
        return not select.select([self._reader], [], [], 0)[0]

    def qsize(self) -> int:
        """1 if anything is waiting, else 0: the kernel doesn't report how much."""
        return 0 if self.empty() else 1

    def close(self) -> None:
        """Do nothing: what was put has already left this process."""

    def join_thread(self) -> None:
        """Do nothing: there is no thread."""


class SocketEvent:
    """A flag that one process sets and others see, permanently."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()

    def set(self) -> None:
        """Set the flag."""
        self._writer.send(b"\0")

    def is_set(self) -> bool:
        """Whether the flag is set."""
        return self.wait(0)

    def wait(self, timeout: float) -> bool:
        """Wait up to ``timeout`` seconds; whether the flag is set then."""
        return bool(select.select([self._reader], [], [], timeout)[0])
