"""The agent's side of its launchers: requests, answers, and a new launcher when one dies.

A :class:`LauncherPool` keeps two launcher processes (:mod:`hostruntime.container.lxc`) and gives
each request to the one with the least to do.  What was attached through a launcher that died is
lost to the agent (its exit cannot be seen any more), so it is reported as lost; containers live on.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from hostruntime.container import channel
from hostruntime.container.gate import Gate
from hostruntime.errors import Exhausted, HostError, HostFault, HostUnavailable
from hostruntime.host.patience import Patience, process_tree
from hostruntime.host.run import Process, spawn, wait_or_kill
from hostruntime.host.tasks import in_thread, run_to_completion, writable

LAUNCHERS = 2
_REQUEST_TIMEOUT_SECONDS = 30.0
_CLOSE_SECONDS = 1.0
NO_PROCESS = (
    "The sandbox cannot start one more process: it is out of processes or memory, or is just "
    "ending. End some of what runs in it, or use a larger size."
)
_HEADER = struct.Struct("!I")
_PACKAGE_PARENT = Path(__file__).resolve().parents[2]
_log = logging.getLogger(__name__)


AT_A_LIMIT = (
    "This host is out of processes, descriptors or memory of its own, so nothing can be begun in "
    "the sandbox. It is no fault of yours, and what runs goes on; try again in a moment."
)
# A launcher with more than this part of the descriptors that it may have is to be replaced.
_WORN = 0.5
_MOST_RETIRED = 4


class LauncherLost(HostUnavailable):
    """A launcher process died, or was ended, while it was needed: another is there at once.

    What was to be started is undone, and what was attached has ended.
    """


class AtLimit(HostUnavailable):
    """A launcher, or the host, is at a limit: another launcher may still do it."""


@dataclass
class Attached:
    """A process attached to a container.  ``ended`` resolves to its wait status (wait(2))."""

    request: int
    pid: int
    pid_inside: int
    ended: asyncio.Future[int]
    _link: Link

    async def kill(self) -> None:
        """SIGKILL the process; what it started lives on."""
        with contextlib.suppress(LauncherLost):
            await self._link.request(
                {"do": "signal", "target": self.request, "signal": int(signal.SIGKILL)}
            )


@dataclass
class Link:
    """One launcher process and the connection to it."""

    process: Process
    sock: socket.socket
    pending: dict[int, asyncio.Future[dict[str, Any]]] = field(default_factory=dict)
    exits: dict[int, asyncio.Future[int]] = field(default_factory=dict)
    alive: bool = True
    _ids: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    _sending: asyncio.Lock = field(default_factory=asyncio.Lock)
    _reader: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls, lxcpath: Path, log: Path, keep: Sequence[int], apparmor: str | None
    ) -> Link:
        """Start a launcher that also keeps these descriptors open.  Raises HostError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            fd = theirs.fileno()
            argv = [sys.executable, "-m", "hostruntime.container.lxc", str(fd), str(lxcpath)]
            argv += [] if apparmor is None else [apparmor]
            begin = partial(spawn, argv, log=log, cwd=_PACKAGE_PARENT, pass_fds=[fd, *keep])
            process = await in_thread(begin)
        ours.setblocking(False)  # noqa: FBT003 - positional-only
        link = cls(process, ours)
        link._reader = asyncio.create_task(link._read())
        return link

    @property
    def load(self) -> int:
        """How many requests wait for an answer."""
        return len(self.pending)

    async def request(self, message: dict[str, Any], fds: Sequence[int] = ()) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises LauncherLost, or HostFault with what the launcher says went wrong.  A launcher
        that neither answers nor does anything is killed: LXC hangs in it.
        """
        return await self._numbered(next(self._ids), message, fds)

    async def attach(self, message: dict[str, Any], fds: Sequence[int]) -> Attached:
        """Attach a process; its end will be known even if it ends at once."""
        number = next(self._ids)
        ended = self.exits[number] = asyncio.get_running_loop().create_future()
        try:
            reply = await self._numbered(number, {"do": "attach", **message}, fds)
        except LauncherLost:
            self.exits.pop(number, None)
            raise
        except AtLimit:
            self.exits.pop(number, None)
            raise
        except HostFault as error:
            self.exits.pop(number, None)
            _log.warning("nothing could be attached to %s: %s", message.get("name"), error)
            raise Exhausted(NO_PROCESS) from error
        except BaseException:
            self.exits.pop(number, None)
            raise
        return Attached(number, int(reply["pid"]), int(reply["pid_inside"] or 0), ended, self)

    async def _numbered(
        self, request: int, message: dict[str, Any], fds: Sequence[int]
    ) -> dict[str, Any]:
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.pending[request] = answer
        patience = Patience(_REQUEST_TIMEOUT_SECONDS, self._processes)
        try:
            async with patience:
                await self._send({"id": request, **message}, fds)
                reply = await answer
        except TimeoutError:
            _log.error("launcher %d is ended: it %s", self.process.pid, patience.reason)
            self.process.kill()
            raise LauncherLost(
                "What starts containers and commands hung, and was replaced; try again."
            ) from None
        finally:
            self.pending.pop(request, None)
        if reply.get("at_limit"):
            _log.error("launcher %d is at a limit: %s", self.process.pid, reply["error"])
            raise AtLimit(AT_A_LIMIT)
        if "error" in reply:
            raise HostFault(str(reply["error"]))
        return reply

    def descriptors(self) -> tuple[int, int]:
        """How many the launcher has open, and how many it may; (0, 0) of one that has ended."""
        pid = self.process.pid
        try:
            most, _ = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()), most
        except (OSError, ValueError):
            return 0, 0

    @property
    def idle(self) -> bool:
        """Whether it neither owes an answer nor has anything attached."""
        return not self.pending and not self.exits

    def _processes(self) -> list[int]:
        """The launcher, and what it has forked that has not become something else yet."""
        own = _executable(self.process.pid)
        return process_tree(self.process.pid, lambda pid: _executable(pid) == own)

    async def close(self) -> None:
        """End the launcher; it kills what is still attached through it."""
        self.alive = False
        if self._reader is not None:
            self._reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader
        self.sock.close()
        self._fail_everything()
        await asyncio.to_thread(wait_or_kill, self.process, _CLOSE_SECONDS)

    async def _send(self, message: dict[str, Any], fds: Sequence[int]) -> None:
        loop, data = asyncio.get_running_loop(), channel.encode(message)
        async with self._sending:
            if not self.alive:
                raise _lost()
            try:
                if fds:
                    data = data[await self._send_with_fds(data, fds) :]
                await loop.sock_sendall(self.sock, data)
            except OSError as error:
                raise _lost() from error

    async def _send_with_fds(self, data: bytes, fds: Sequence[int]) -> int:
        while True:
            try:
                return socket.send_fds(self.sock, [data], list(fds))
            except BlockingIOError:
                await writable(self.sock.fileno())

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        buffer = bytearray()
        try:
            while data := await loop.sock_recv(self.sock, 65_536):
                buffer += data
                while (message := _take_message(buffer)) is not None:
                    self._handle(message)
        except OSError:
            _log.exception("the connection to a launcher broke")
        self.alive = False
        _log.error("launcher %d ended", self.process.pid)
        self._fail_everything()

    def _handle(self, message: dict[str, Any]) -> None:
        if "exit" in message:
            ended = self.exits.pop(int(message["exit"]), None)
            if ended is not None and not ended.done():
                ended.set_result(int(message["status"]))
            return
        answer = self.pending.get(int(message["id"]))
        if answer is not None and not answer.done():
            answer.set_result(message)

    def _fail_everything(self) -> None:
        waiting: list[asyncio.Future[Any]] = [*self.pending.values(), *self.exits.values()]
        for future in waiting:
            if not future.done():
                future.set_exception(_lost())
                future.exception()  # Whoever waits sees it; nobody waiting is no error.
        self.exits.clear()


class LauncherPool:
    """Two launchers, replaced when they die or are at a limit.  Belongs to one event loop.

    One that is at a limit begins nothing more, and ends when all has that was attached through it.
    ``keep`` are descriptors that launchers hold for as long as they live; ``apparmor`` is the
    profile of what they put into containers.
    """

    def __init__(
        self, lxcpath: Path, log: Path, keep: Sequence[int] = (), apparmor: str | None = None
    ) -> None:
        self._lxcpath = lxcpath
        self._log = log
        self._keep = tuple(keep)
        self._apparmor = apparmor
        self._links: list[Link] = []
        self._retired: list[Link] = []
        self._replacing = asyncio.Lock()
        self.gate = Gate()

    async def open(self) -> None:
        """Start the launchers.  Raises HostError, OSError."""
        for _ in range(LAUNCHERS):
            self._links.append(await self._open_link())

    async def close(self) -> None:
        """End the launchers; containers stay."""
        await asyncio.gather(*(link.close() for link in self._all))
        self._links.clear()
        self._retired.clear()

    async def start(self, message: dict[str, Any]) -> int:
        """Start a container; return its init's pid.  Raises AtLimit, HostFault, LauncherLost.

        A cancelled caller still waits for the answer, so that what it undoes is all there is.
        """
        reply = await run_to_completion(
            self._by_a_launcher(lambda link: link.request({"do": "start", **message}))
        )
        return int(reply["init_pid"])

    async def attach(self, message: dict[str, Any], fds: Sequence[int]) -> Attached:
        """Attach a process to a container.

        Raises ContainerPaused, AtLimit, Exhausted, HostFault, LauncherLost.
        Waits while the container's gate is shut.  When the caller is cancelled the process is
        killed before this returns.
        """
        async with self.gate.entering(str(message["name"])):
            return await self._attach(message, fds)

    async def _attach(self, message: dict[str, Any], fds: Sequence[int]) -> Attached:
        task = asyncio.ensure_future(self._by_a_launcher(lambda link: link.attach(message, fds)))
        try:
            return await run_to_completion(task)
        except asyncio.CancelledError:
            if not task.cancelled() and task.exception() is None:
                await task.result().kill()
            raise

    async def forget(self, name: str) -> None:
        """Let the launchers drop what they remember of a container that has ended."""
        await self.gate.forget(name)
        for link in self._all:
            with contextlib.suppress(HostError):
                await link.request({"do": "forget", "name": name})

    async def tend(self) -> None:
        """Replace the launchers that near a limit, and end those that were and have nothing to do.

        Raises HostError, OSError when there can be no other; the old ones then serve on.
        """
        for link in list(self._links):
            used, most = link.descriptors()
            if used > most * _WORN:
                _log.error("launcher %d has %d of %d descriptors", link.process.pid, used, most)
                await self._retire(link)
        for link in [each for each in self._retired if each.idle or not each.alive]:
            self._retired.remove(link)
            await link.close()

    def pids(self) -> list[int]:
        """The launchers' pids."""
        return [link.process.pid for link in self._all]

    @property
    def _all(self) -> list[Link]:
        return [*self._links, *self._retired]

    async def _by_a_launcher[T](self, ask: Callable[[Link], Awaitable[T]]) -> T:
        """Have a launcher do it; if that one is at a limit, a new one.

        Raises AtLimit when that is, too: then it is the host.
        """
        link = await self._least_busy()
        try:
            return await ask(link)
        except AtLimit as error:
            try:
                await self._retire(link)
            except (HostError, OSError):
                _log.exception("there can be no other launcher")
                raise error from None
        return await ask(await self._least_busy())

    async def _least_busy(self) -> Link:
        if not all(link.alive for link in self._links):
            await self._replace_dead()
        return min(self._links, key=lambda link: link.load)

    async def _open_link(self) -> Link:
        return await Link.open(self._lxcpath, self._log, self._keep, self._apparmor)

    async def _retire(self, link: Link) -> None:
        """Have another launcher in a launcher's place, which goes on with what it has begun."""
        async with self._replacing:
            # Somebody else may have found the same; and not one after the other while none is well.
            if link not in self._links or len(self._retired) >= _MOST_RETIRED:
                return
            self._links[self._links.index(link)] = await self._open_link()
            self._retired.append(link)

    async def _replace_dead(self) -> None:
        async with self._replacing:
            for index, link in enumerate(self._links):
                if not link.alive:
                    await link.close()
                    self._links[index] = await self._open_link()


def _take_message(buffer: bytearray) -> dict[str, Any] | None:
    if len(buffer) < _HEADER.size:
        return None
    (length,) = _HEADER.unpack_from(buffer)
    end = _HEADER.size + length
    if len(buffer) < end:
        return None
    message = json.loads(buffer[_HEADER.size : end])
    del buffer[:end]
    return message if isinstance(message, dict) else {}


def _executable(pid: int) -> tuple[int, int] | None:
    """Which file a process runs, as device and inode; None if it has ended."""
    try:
        found = Path(f"/proc/{pid}/exe").stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _lost() -> LauncherLost:
    return LauncherLost("What starts containers and commands died, and is replaced; try again.")


def close_all(descriptors: Sequence[int]) -> None:
    """Close descriptors, ignoring those that are closed already."""
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
