"""The front's event loop: accepting visitors, within limits, until it is told to stop.

Requests have a place each, of which a sandbox and a team have no more than their share, so that
nobody's visitors keep another's out. Connections without a request only wait: when there are too
many, the one that has waited longest makes room. So whoever comes is heard, health checks above
all, as long as its request comes soon.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import h11

from hostruntime.host.tasks import cancel_and_wait, every
from orkestr_console.core.listening import Network, visitor_address
from orkestr_console.core.preview_base import PreviewBase
from orkestr_console.http.processes import Place
from orkestr_console.http.threads import ServerThreads, in_thread, server_threads
from orkestr_console.previews.visits import TooMany, Visitor
from orkestr_console.previews.wire import Headers, Wire
from sandboxes_app import services
from sandboxes_app.models import Sandbox

logger = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
# How soon after a sandbox's end its visitors' connections are ended that have not ended by it.
CUT_SECONDS = 5.0
# How long requests may go on after SIGTERM; less than the process gets (http.processes).
GRACE_SECONDS = 5.0
PAUSE_AFTER_FAILURE_SECONDS = 0.1
# What a connection and its request take: two sockets, and one to ask the host with.
DESCRIPTORS_PER_REQUEST, OTHER_DESCRIPTORS = 3, 64
# A visitor who has vanished is noticed after some minutes (tcp(7)).
KEEP_ALIVE = {
    socket.TCP_KEEPIDLE: 60,
    socket.TCP_KEEPINTVL: 20,
    socket.TCP_KEEPCNT: 3,
}


@dataclass(frozen=True)
class Limits:
    """How many connections there may be, and how many requests at once, and of whom.

    The connections that requests leave are for those who have none yet.
    """

    connections: int = 2048
    requests: int = 1792
    per_team: int = 512
    per_sandbox: int = 128

    @classmethod
    def of_process(cls) -> Limits:
        """As many as this process may have descriptors for."""
        allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = max((allowed - OTHER_DESCRIPTORS) // DESCRIPTORS_PER_REQUEST, 16)
        usual = cls()
        connections = min(usual.connections, most)
        return cls(connections, connections * 7 // 8, connections // 4, connections // 16)


@dataclass
class Front:
    """All visitors, on one event loop."""

    base: PreviewBase
    proxies: Sequence[Network] = ()
    limits: Limits = field(default_factory=Limits)
    _visits: dict[Visitor, asyncio.Task[None]] = field(default_factory=dict)
    # Those without a request, the one that has waited longest first.
    _waiting: dict[Visitor, None] = field(default_factory=dict)
    _teams: Counter[object] = field(default_factory=Counter)
    # The requests under way, by sandbox.
    _requests: dict[str, set[asyncio.Task[None]]] = field(default_factory=dict)

    async def accept(self, listening: socket.socket) -> None:
        """Accept visitors until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, address = await loop.sock_accept(listening)
            except OSError as error:
                # Most likely there are no descriptors left.
                logger.error("a visitor could not be accepted: %s", error)
                self._make_room()
                await asyncio.sleep(PAUSE_AFTER_FAILURE_SECONDS)
                continue
            self.begin(sock, str(address[0]) if address else "")
            # The others go on as well, however many come.
            await asyncio.sleep(0)

    def begin(self, sock: socket.socket, peer: str) -> asyncio.Task[None] | None:
        """Serve a visitor; one too many, for whom nobody can make room, is sent away."""
        if len(self._visits) >= self.limits.connections and not self._make_room():
            sock.close()
            return None
        sock.setblocking(False)  # noqa: FBT003 - positional-only
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in KEEP_ALIVE.items():
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
        visitor = Visitor(Wire(sock, h11.SERVER), peer, self)
        task = asyncio.create_task(visitor.serve())
        self._visits[visitor] = task
        task.add_done_callback(lambda _: self._forget(visitor))
        return task

    def _forget(self, visitor: Visitor) -> None:
        self._visits.pop(visitor, None)
        self._waiting.pop(visitor, None)

    def _make_room(self) -> bool:
        longest = next(iter(self._waiting), None)
        if longest is not None:
            self._visits[longest].cancel()
            self._forget(longest)
        return longest is not None

    # What a visit shares with the others (visits.Surroundings) ---------------------------------

    def waits(self, visit: Visitor, *, for_request: bool) -> None:
        """A visitor waits for its next request, and may have to make room; or does no more."""
        self._waiting.pop(visit, None)
        if for_request:
            self._waiting[visit] = None

    @contextmanager
    def place(self, sandbox: Sandbox) -> Iterator[None]:
        """A place among a sandbox's and its team's requests. Raises ``TooMany``."""
        team, task = sandbox.team_id, asyncio.current_task()
        assert task is not None
        requests = self._requests.setdefault(sandbox.pk, set())
        try:
            if (
                len(requests) >= self.limits.per_sandbox
                or self._teams[team] >= self.limits.per_team
                or self._teams.total() >= self.limits.requests
            ):
                raise TooMany
            requests.add(task)
            self._teams[team] += 1
            try:
                yield
            finally:
                requests.discard(task)
                self._teams[team] -= 1
        finally:
            if not requests:
                self._requests.pop(sandbox.pk, None)
            if not self._teams[team]:
                del self._teams[team]

    def client(self, peer: str, headers: Headers) -> str:
        """The visitor's network address, by what proxies that are trusted say."""
        return visitor_address(peer, headers, self.proxies)

    # Ends ------------------------------------------------------------------------------------

    async def cut_ended(self) -> None:
        """End the requests of sandboxes that have ended: a slow visitor would keep a part of them.

        Programs in them have been killed, so most have ended already.
        """
        if not self._requests:
            return
        for ended in await in_thread(services.ended_among, set(self._requests)):
            for task in self._requests.get(ended, set()).copy():
                task.cancel()

    async def finish(self, seconds: float) -> None:
        """Let requests end for so long, and end those that don't, and all that only wait."""
        for visitor in list(self._waiting):
            self._visits[visitor].cancel()
        tasks = list(self._visits.values())
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)
        await cancel_and_wait(*tasks)


async def serve_visitors(front: Front, place: Place) -> None:
    """Serve on a place's sockets until SIGTERM."""
    # Whatever is started from here on runs its parts in threads of this process's own.
    server_threads.set(ServerThreads())
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    async def beat() -> None:
        place.pulse.beat()

    working = [
        *(asyncio.create_task(front.accept(each)) for each in place.sockets),
        every(BEAT_SECONDS, beat, "no heartbeat", immediately=True),
        every(CUT_SECONDS, front.cut_ended, "visitors of ended sandboxes could not be found"),
    ]
    await stop.wait()
    await cancel_and_wait(*working)
    for each in place.sockets:
        each.close()
    await front.finish(GRACE_SECONDS)
