"""A stub resolver for containers without DNS: it resolves nothing, but records the queries.

A program that does not use the proxy queries DNS first, and then only reports "could not resolve".
So each container with network `restricted` or `off` has a resolver on its own loopback. Its socket
belongs to the agent, but was created in the container's network namespace and stays there
(network_namespaces(7)): no packet leaves the namespace, and the socket identifies the container.
Nothing is ever forwarded. The response is always NXDOMAIN, the only one after which neither glibc
nor musl retries.

One thread serves all sockets, a few queries from each in turn. If a container exceeds
:data:`PER_SECOND`, its socket is not read for a while; its buffer fills, and the kernel drops
further queries.
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

ADDRESS, PORT = "127.0.0.53", 53
# The rate of a container's queries: a burst, then so many per second.
BURST = 200.0
PER_SECOND = 20.0
_PAUSE_SECONDS = 0.2
_QUERIES_PER_TURN = 16
_BUFFER_BYTES = 32 * 1024
# More than a name of 255 bytes (RFC 1035, section 2.3.4) and EDNS options.
_MAX_DATAGRAM_BYTES = 1500
_MAX_NAME_BYTES = 255
_MAX_LABEL_BYTES = 63
_HEADER = struct.Struct("!HHHHHH")  # RFC 1035, section 4.1.1
_RESPONSE_OR_OPCODE, _RECURSION_DESIRED = 0xF800, 0x0100
_NXDOMAIN = 0x8080 | 3  # a response, recursion available, NXDOMAIN
# Queries for A and AAAA of one name, sent together, count as one.
_PAIR_SECONDS = 0.1
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """The question of a query; ``kind`` is the record type, ``end`` its end offset."""

    name: str
    kind: int
    end: int


@dataclass
class _Client:
    """One container's socket, the callback for its queries, and its remaining quota."""

    handle: socket.socket
    on_query: Callable[[str], None]
    quota: float = BURST
    updated_at: float = field(default_factory=time.monotonic)
    previous: tuple[str, int, float] = ("", 0, 0.0)

    def has_quota(self) -> bool:
        now = time.monotonic()
        self.quota = min(BURST, self.quota + (now - self.updated_at) * PER_SECOND)
        self.updated_at = now
        return self.quota >= 1

    def answer(self, datagram: bytes, sender: tuple[str, int]) -> None:
        """Report a query, then answer it: once the program has a response, it must be recorded.

        The second query of an A and AAAA pair is not reported.
        """
        question = parse_question(datagram)
        if question is None:
            return
        name, kind, at = self.previous
        now = time.monotonic()
        if name != question.name or kind == question.kind or now - at > _PAIR_SECONDS:
            self.previous = (question.name, question.kind, now)
            _notify(self.on_query, question.name)
        with suppress(OSError):  # the socket was closed, or the sender does not read
            self.handle.sendto(nxdomain(datagram, question), sender)


type _Query = tuple[_Client, bytes, tuple[str, int]]


class StubResolver:
    """The sockets of one instance's containers.  Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clients: dict[Path, _Client] = {}
        self._by_descriptor: dict[int, _Client] = {}
        self._paused: dict[int, float] = {}
        self._thread: threading.Thread | None = None
        self._poll: select.epoll | None = None
        self._wake = -1

    def add(self, namespace: Path, on_query: Callable[[str], None]) -> None:
        """Start answering in a namespace, which the calling thread must be in.

        ``on_query`` gets each name, in another thread.  Raises OSError, for instance if a program
        in there already uses the address.
        """
        self.remove(namespace)
        handle = _bind_socket()
        with self._lock:
            poll = self._poll or self._start()
            poll.register(handle, select.EPOLLIN)
            client = self._clients[namespace] = _Client(handle, on_query)
            self._by_descriptor[handle.fileno()] = client

    def remove(self, namespace: Path) -> None:
        """Close the socket in a namespace, which would keep it alive; idempotent."""
        with self._lock:
            self._close(namespace)

    def close(self) -> None:
        """Close all sockets and stop the thread; a later :meth:`add` restarts it."""
        with self._lock:
            for namespace in list(self._clients):
                self._close(namespace)
            thread, self._thread = self._thread, None
            poll, self._poll = self._poll, None
            if thread is not None:
                os.eventfd_write(self._wake, 1)
        if thread is not None and poll is not None:
            thread.join()
            poll.close()
            os.close(self._wake)

    def _start(self) -> select.epoll:
        self._poll = poll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        poll.register(self._wake, select.EPOLLIN)
        self._thread = threading.Thread(
            target=self._serve, args=(poll, self._wake), name="stub resolver", daemon=True
        )
        self._thread.start()
        return poll

    def _close(self, namespace: Path) -> None:
        client = self._clients.pop(namespace, None)
        if client is not None and self._poll is not None:
            descriptor = client.handle.fileno()
            del self._by_descriptor[descriptor]
            if self._paused.pop(descriptor, None) is None:
                self._poll.unregister(descriptor)
            client.handle.close()

    # The thread ---------------------------------------------------------------------------

    def _serve(self, poll: select.epoll, wake: int) -> None:
        _join_own_namespace()
        while True:
            ready = [found for found, _ in poll.poll(_PAUSE_SECONDS if self._paused else None)]
            if wake in ready:
                return
            for descriptor in ready:
                with log_errors("a query to a container's resolver could not be answered"):
                    for client, datagram, sender in self._receive_some(poll, descriptor):
                        client.answer(datagram, sender)
            with self._lock, log_errors("a container's resolver could not be resumed"):
                self._resume(poll)

    def _receive_some(self, poll: select.epoll, descriptor: int) -> list[_Query]:
        """Receive some of the queries waiting at a socket."""
        found: list[_Query] = []
        with self._lock:
            client = self._by_descriptor.get(descriptor)
            if client is None:
                return []
            for _ in range(_QUERIES_PER_TURN):
                if not client.has_quota():
                    poll.unregister(descriptor)
                    self._paused[descriptor] = time.monotonic() + _PAUSE_SECONDS
                    break
                try:
                    datagram, sender = client.handle.recvfrom(_MAX_DATAGRAM_BYTES)
                except OSError:
                    break
                client.quota -= 1
                found.append((client, datagram, sender))
        return found

    def _resume(self, poll: select.epoll) -> None:
        now = time.monotonic()
        for descriptor in [paused for paused, until in self._paused.items() if until <= now]:
            del self._paused[descriptor]
            poll.register(descriptor, select.EPOLLIN)


def _notify(on_query: Callable[[str], None], name: str) -> None:
    try:
        on_query(name)
    except Exception:  # noqa: BLE001 - other containers' queries must still be answered
        _log.exception("the query for %r could not be recorded", name)


def _join_own_namespace() -> None:
    """Leave the namespace of whoever started this thread, which would keep it alive."""
    own = Path("/proc/self/ns/net")
    if not own.samefile("/proc/thread-self/ns/net"):
        with own.open("rb") as handle:
            os.setns(handle.fileno(), os.CLONE_NEWNET)


def _bind_socket() -> socket.socket:
    """Bind a socket to the resolver's address in the calling thread's network namespace."""
    handle = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        # A resolver of the container's own can still bind to all addresses.
        handle.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        handle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        handle.bind((ADDRESS, PORT))
    except OSError:
        handle.close()
        raise
    return handle


# Messages ------------------------------------------------------------------------------------


def parse_question(datagram: bytes) -> Question | None:
    """Parse a query for one name (RFC 1035, section 4.1); None for anything else."""
    if len(datagram) < _HEADER.size:
        return None
    _, flags, questions, *_ = _HEADER.unpack_from(datagram)
    if flags & _RESPONSE_OR_OPCODE or questions != 1:
        return None
    labels: list[str] = []
    at = _HEADER.size
    while at < len(datagram) and (length := datagram[at]) != 0:
        label = datagram[at + 1 : at + 1 + length]
        # A greater length is a pointer (section 4.1.4), which a question does not need.
        if length > _MAX_LABEL_BYTES or not label.isascii() or at > _MAX_NAME_BYTES:
            return None
        labels.append(label.decode("ascii"))
        at += 1 + length
    end = at + 5  # the root label, type and class
    if end > len(datagram):
        return None
    return Question(".".join(labels), int.from_bytes(datagram[at + 1 : at + 3]), end)


def nxdomain(datagram: bytes, question: Question) -> bytes:
    """Return the response to a query: the name does not exist."""
    number, flags, *_ = _HEADER.unpack_from(datagram)
    response_flags = _NXDOMAIN | (flags & _RECURSION_DESIRED)
    return _HEADER.pack(number, response_flags, 1, 0, 0, 0) + datagram[_HEADER.size : question.end]
