"""The resolver of containers without DNS: it knows no name, and tells which were asked for.

A program that does not use the proxy asks DNS first, and all that it then says is "could not
resolve".  So each container of network `restricted` or `off` has a resolver on its own loopback.
Its socket is the agent's, but was made in the container's network namespace and stays there
(network_namespaces(7)): no packet leaves the namespace, and whose a question is needs no address
to tell.  Nothing is ever forwarded.  Every name is said not to exist (NXDOMAIN), the one answer
after which neither glibc nor musl ask again.

One thread reads all sockets, a few questions of each in turn.  A container that asks faster than
:data:`PER_SECOND` is not read until it may ask again; what it sends meanwhile fills its own
socket's buffer, and is then dropped by the kernel.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from hostruntime.host.tasks import log_errors
from hostruntime.network.netns import within

ADDRESS, PORT = "127.0.0.53", 53
# Questions a container may ask: so many at once, and then so many a second.
BURST = 200.0
PER_SECOND = 20.0
_PAUSE_SECONDS = 0.2
_A_TURN = 16
_BUFFER_BYTES = 32 * 1024
# A name of 255 bytes (RFC 1035, section 2.3.4) and what EDNS adds are less.
_MOST_BYTES = 1500
_MOST_OF_A_NAME = 255
_MOST_OF_A_LABEL = 63
_HEADER = struct.Struct("!HHHHHH")  # RFC 1035, section 4.1.1
_RESPONSE_OR_OPCODE, _RECURSION_DESIRED = 0xF800, 0x0100
_NO_SUCH_NAME = 0x8080 | 3  # a response, recursion available, NXDOMAIN
# A and AAAA of one name, asked for at once, are one question.
_TOGETHER_SECONDS = 0.1
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """What one datagram asks; ``kind`` is the type of record, ``end`` where the question ends."""

    name: str
    kind: int
    end: int


@dataclass
class _Station:
    """One container's socket, whom to tell of its questions, and how many it has left."""

    handle: socket.socket
    tell: Callable[[str], None]
    left: float = BURST
    at: float = field(default_factory=time.monotonic)
    before: tuple[str, int, float] = ("", 0, 0.0)

    def may_ask(self) -> bool:
        now = time.monotonic()
        self.left = min(BURST, self.left + (now - self.at) * PER_SECOND)
        self.at = now
        return self.left >= 1

    def answer(self, datagram: bytes, sender: tuple[str, int]) -> None:
        """Tell of a question and answer it, in this order: then who asks may end, and be asked of.

        That of the other half of the question before is not told.
        """
        question = parse_question(datagram)
        if question is None:
            return
        name, kind, at = self.before
        now = time.monotonic()
        if name != question.name or kind == question.kind or now - at > _TOGETHER_SECONDS:
            self.before = (question.name, question.kind, now)
            _told(self.tell, question.name)
        with suppress(OSError):  # it is not attended any more, or who asked does not read
            self.handle.sendto(no_such_name(datagram, question), sender)


type _Asked = tuple[_Station, bytes, tuple[str, int]]


class StubResolver:
    """The sockets of one instance's containers.  Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stations: dict[Path, _Station] = {}
        self._by_descriptor: dict[int, _Station] = {}
        self._paused: dict[int, float] = {}
        self._thread: threading.Thread | None = None
        self._poll: select.epoll | None = None
        self._wake = -1

    def attend(self, namespace: Path, tell: Callable[[str], None]) -> None:
        """Answer in a namespace from now on; ``tell`` gets each name, in another thread.

        Raises OSError, as when a program in there has the address already.
        """
        self.leave(namespace)
        handle = within(namespace, _bound)
        with self._lock:
            poll = self._poll or self._begin()
            poll.register(handle, select.EPOLLIN)
            station = self._stations[namespace] = _Station(handle, tell)
            self._by_descriptor[handle.fileno()] = station

    def leave(self, namespace: Path) -> None:
        """Close the socket in a namespace, which would keep that alive; idempotent."""
        with self._lock:
            self._close(namespace)

    def close(self) -> None:
        """Close all sockets and end the thread; a later :meth:`attend` begins anew."""
        with self._lock:
            for namespace in list(self._stations):
                self._close(namespace)
            thread, self._thread = self._thread, None
            poll, self._poll = self._poll, None
            if thread is not None:
                os.eventfd_write(self._wake, 1)
        if thread is not None and poll is not None:
            thread.join()
            poll.close()
            os.close(self._wake)

    def _begin(self) -> select.epoll:
        self._poll = poll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        poll.register(self._wake, select.EPOLLIN)
        self._thread = threading.Thread(
            target=self._serve, args=(poll, self._wake), name="stub resolver", daemon=True
        )
        self._thread.start()
        return poll

    def _close(self, namespace: Path) -> None:
        station = self._stations.pop(namespace, None)
        if station is not None and self._poll is not None:
            descriptor = station.handle.fileno()
            del self._by_descriptor[descriptor]
            if self._paused.pop(descriptor, None) is None:
                self._poll.unregister(descriptor)
            station.handle.close()

    # The thread ---------------------------------------------------------------------------

    def _serve(self, poll: select.epoll, wake: int) -> None:
        while True:
            ready = [found for found, _ in poll.poll(_PAUSE_SECONDS if self._paused else None)]
            if wake in ready:
                return
            for descriptor in ready:
                with log_errors("a question to a container's resolver could not be answered"):
                    for station, datagram, sender in self._turn(poll, descriptor):
                        station.answer(datagram, sender)
            with self._lock, log_errors("a container's resolver could not go on"):
                self._resume(poll)

    def _turn(self, poll: select.epoll, descriptor: int) -> list[_Asked]:
        """Read some of what waits at a socket."""
        found: list[_Asked] = []
        with self._lock:
            station = self._by_descriptor.get(descriptor)
            if station is None:
                return []
            for _ in range(_A_TURN):
                if not station.may_ask():
                    poll.unregister(descriptor)
                    self._paused[descriptor] = time.monotonic() + _PAUSE_SECONDS
                    break
                try:
                    datagram, sender = station.handle.recvfrom(_MOST_BYTES)
                except OSError:
                    break
                station.left -= 1
                found.append((station, datagram, sender))
        return found

    def _resume(self, poll: select.epoll) -> None:
        now = time.monotonic()
        for descriptor in [one for one, until in self._paused.items() if until <= now]:
            del self._paused[descriptor]
            poll.register(descriptor, select.EPOLLIN)


def _told(tell: Callable[[str], None], name: str) -> None:
    try:
        tell(name)
    except Exception:  # noqa: BLE001 - the others' questions are still to be answered
        _log.exception("the question for %r could not be recorded", name)


def _bound() -> socket.socket:
    """A socket at the resolver's address in the calling thread's network namespace."""
    handle = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        # A resolver of the container's own, on all addresses, still finds room beside it.
        handle.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        handle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        handle.bind((ADDRESS, PORT))
    except OSError:
        handle.close()
        raise
    return handle


# What is said --------------------------------------------------------------------------------


def parse_question(datagram: bytes) -> Question | None:
    """Read a query for one name (RFC 1035, section 4.1); None for anything else."""
    if len(datagram) < _HEADER.size:
        return None
    _, flags, questions, *_ = _HEADER.unpack_from(datagram)
    if flags & _RESPONSE_OR_OPCODE or questions != 1:
        return None
    labels: list[str] = []
    at = _HEADER.size
    while at < len(datagram) and (length := datagram[at]) != 0:
        label = datagram[at + 1 : at + 1 + length]
        # A longer length is a pointer (section 4.1.4), of which a question has no need.
        if length > _MOST_OF_A_LABEL or not label.isascii() or at > _MOST_OF_A_NAME:
            return None
        labels.append(label.decode("ascii"))
        at += 1 + length
    end = at + 5  # the root label, type and class
    if end > len(datagram):
        return None
    return Question(".".join(labels), int.from_bytes(datagram[at + 1 : at + 3]), end)


def no_such_name(datagram: bytes, question: Question) -> bytes:
    """The answer to a query: the name does not exist."""
    number, flags, *_ = _HEADER.unpack_from(datagram)
    said = _NO_SUCH_NAME | (flags & _RECURSION_DESIRED)
    return _HEADER.pack(number, said, 1, 0, 0, 0) + datagram[_HEADER.size : question.end]
