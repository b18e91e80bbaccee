"""The agent's side of its launchers: requests, responses, and a new launcher when one dies.

A :class:`LauncherPool` keeps two launcher processes (:mod:`hostruntime.container.lxc`) and sends
all requests about one container to the same one unless that is much busier.  When a launcher dies,
the exit of what was attached through it can no longer be observed, so those processes are reported
as lost; containers keep running.
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
import zlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from hostruntime.container.gate import Gate
from hostruntime.errors import Exhausted, HostError, HostFault, HostUnavailable
from hostruntime.host import channel
from hostruntime.host.patience import Patience, process_tree, scaled
from hostruntime.host.run import Process, spawn, wait_or_kill
from hostruntime.host.tasks import in_thread, readable, run_to_completion, writable

LAUNCHER_COUNT = 2
_REQUEST_TIMEOUT_SECONDS = 30.0
_CLOSE_SECONDS = 1.0
# What an empty pipe takes in one piece (pipe(7)).
_ANSWER_BYTES = 64 * 1024
NO_PROCESS_MESSAGE = (
    "The sandbox cannot start one more process: it is out of processes or memory, or is just "
    "ending. End some of what runs in it, or use a larger size."
)
_HEADER = struct.Struct("!I")
_PACKAGE_PARENT = Path(__file__).resolve().parents[2]
_log = logging.getLogger(__name__)


AT_LIMIT_MESSAGE = (
    "This host is out of processes, descriptors or memory of its own, so nothing can be started in "
    "the sandbox. It isn't your fault, and running commands continue; try again in a moment."
)
# Replace a launcher that uses more than this share of its descriptor limit.
_MAX_DESCRIPTOR_SHARE = 0.5
_MAX_RETIRED = 4
# How many more requests than the other a launcher may have before a container changes over to that.
_MAX_EXTRA_LOAD = 4


class LauncherLost(HostUnavailable):
    """A launcher process died or was killed during a request; it is replaced immediately.

    A start in progress is undone, and attached processes have exited.
    """


class AtLimit(HostUnavailable):
    """A launcher, or the host, has reached a limit; another launcher may still succeed."""


@dataclass
class Attached:
    """A process attached to a container.  ``exit_status`` resolves to its wait status (wait(2))."""

    request: int
    pid: int
    pid_inside: int
    exit_status: asyncio.Future[int]
    _link: Link

    async def kill(self) -> None:
        """Send SIGKILL to the process, not to its children."""
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
        cls, lxcpath: Path, log: Path, inherited_fds: Sequence[int], apparmor: str | None
    ) -> Link:
        """Start a launcher that also inherits these descriptors.  Raises HostError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            fd = theirs.fileno()
            argv = [sys.executable, "-m", "hostruntime.container.lxc", str(fd), str(lxcpath)]
            argv += [] if apparmor is None else [apparmor]
            start = partial(
                spawn, argv, log=log, cwd=_PACKAGE_PARENT, pass_fds=[fd, *inherited_fds]
            )
            process = await in_thread(start)
        ours.setblocking(False)  # noqa: FBT003 - positional-only
        link = cls(process, ours)
        link._reader = asyncio.create_task(link._read())
        return link

    @property
    def load(self) -> int:
        """The number of requests without a response."""
        return len(self.pending)

    async def request(self, message: dict[str, Any], fds: Sequence[int] = ()) -> dict[str, Any]:
        """Send a request and wait for its response.

        Raises LauncherLost, or HostFault with the launcher's error.  A launcher that neither
        responds nor makes progress is killed: LXC hangs in it.
        """
        return await self._send_and_wait(next(self._ids), message, fds)

    async def forget(self, name: str) -> None:
        """Have it drop its state of a container; one that is lost has none."""
        with contextlib.suppress(HostError):
            await self.request({"do": "forget", "name": name})

    async def attach(self, message: dict[str, Any], fds: Sequence[int]) -> Attached:
        """Attach a process; its exit status is reported even if it exits immediately."""
        number = next(self._ids)
        exit_status = self.exits[number] = asyncio.get_running_loop().create_future()
        try:
            reply = await self._send_and_wait(number, {"do": "attach", **message}, fds)
        except LauncherLost:
            self.exits.pop(number, None)
            raise
        except AtLimit:
            self.exits.pop(number, None)
            raise
        except HostFault as error:
            self.exits.pop(number, None)
            _log.warning("nothing could be attached to %s: %s", message.get("name"), error)
            raise Exhausted(NO_PROCESS_MESSAGE) from error
        except BaseException:
            self.exits.pop(number, None)
            raise
        return Attached(number, int(reply["pid"]), int(reply["pid_inside"] or 0), exit_status, self)

    async def _send_and_wait(
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
            _log.error("killing launcher %d: it %s", self.process.pid, patience.reason)
            self.process.kill()
            raise LauncherLost(
                "What starts containers and commands hung, and was replaced; try again."
            ) from None
        finally:
            self.pending.pop(request, None)
        if reply.get("at_limit"):
            _log.error("launcher %d is at a limit: %s", self.process.pid, reply["error"])
            raise AtLimit(AT_LIMIT_MESSAGE)
        if "error" in reply:
            raise HostFault(str(reply["error"]))
        return reply

    def descriptors(self) -> tuple[int, int]:
        """The launcher's number of open descriptors and its limit; (0, 0) if it has exited."""
        pid = self.process.pid
        try:
            limit, _ = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()), limit
        except (OSError, ValueError):
            return 0, 0

    @property
    def idle(self) -> bool:
        """Whether it has no pending request and no attached process."""
        return not self.pending and not self.exits

    def _processes(self) -> list[int]:
        """The launcher and its forks that have not executed another program yet."""
        own = _executable(self.process.pid)
        return process_tree(self.process.pid, lambda pid: _executable(pid) == own)

    async def close(self) -> None:
        """Stop the launcher; it kills what is still attached through it."""
        self.alive = False
        if self._reader is not None:
            self._reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader
        self.sock.close()
        self._fail_all()
        await asyncio.to_thread(wait_or_kill, self.process, _CLOSE_SECONDS)

    async def _send(self, message: dict[str, Any], fds: Sequence[int]) -> None:
        loop, data = asyncio.get_running_loop(), channel.encode(message)
        async with self._sending:
            if not self.alive:
                raise _lost_error()
            try:
                if fds:
                    data = data[await self._send_with_fds(data, fds) :]
                await loop.sock_sendall(self.sock, data)
            except OSError as error:
                raise _lost_error() from error

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
                while (message := _pop_message(buffer)) is not None:
                    self._handle(message)
        except OSError:
            _log.exception("the connection to a launcher broke")
        self.alive = False
        _log.error("launcher %d exited", self.process.pid)
        self._fail_all()

    def _handle(self, message: dict[str, Any]) -> None:
        if "exit" in message:
            exit_status = self.exits.pop(int(message["exit"]), None)
            if exit_status is not None and not exit_status.done():
                exit_status.set_result(int(message["status"]))
            return
        answer = self.pending.get(int(message["id"]))
        if answer is not None and not answer.done():
            answer.set_result(message)

    def _fail_all(self) -> None:
        waiting: list[asyncio.Future[Any]] = [*self.pending.values(), *self.exits.values()]
        for future in waiting:
            if not future.done():
                future.set_exception(_lost_error())
                future.exception()  # Marks it as retrieved: it is no error if nobody waits for it.
        self.exits.clear()


class LauncherPool:
    """Two launchers, replaced when they die or reach a limit.  For use on one event loop.

    A launcher at a limit starts nothing more, and exits when everything attached through it has.
    ``inherited_fds`` are descriptors that launchers keep open for life; ``apparmor`` is the profile
    of the processes they put into containers.
    """

    def __init__(
        self,
        lxcpath: Path,
        log: Path,
        inherited_fds: Sequence[int] = (),
        apparmor: str | None = None,
    ) -> None:
        self._lxcpath = lxcpath
        self._log = log
        self._inherited_fds = tuple(inherited_fds)
        self._apparmor = apparmor
        self._links: list[Link] = []
        self._retired: list[Link] = []
        self._replacing = asyncio.Lock()
        self.gate = Gate()

    async def open(self) -> None:
        """Start the launchers.  Raises HostError, OSError."""
        for _ in range(LAUNCHER_COUNT):
            self._links.append(await self._open_link())

    async def close(self) -> None:
        """Stop the launchers; containers keep running."""
        await asyncio.gather(*(link.close() for link in self._all))
        self._links.clear()
        self._retired.clear()

    async def start(self, message: dict[str, Any]) -> int:
        """Start a container; return its init's pid.  Raises AtLimit, HostFault, LauncherLost.

        A cancelled caller still waits for the response, so that it can undo everything.
        """
        name = str(message["name"])
        reply = await run_to_completion(
            self._retry_at_limit(name, lambda link: link.request({"do": "start", **message}))
        )
        return int(reply["init_pid"])

    async def attach(self, message: dict[str, Any], fds: Sequence[int]) -> Attached:
        """Attach a process to a container.

        Raises ContainerPaused, AtLimit, Exhausted, HostFault, LauncherLost.
        Waits while the container's gate is closed.  If the caller is cancelled, the process is
        killed before this returns.
        """
        async with self.gate.entering(str(message["name"])):
            return await self._attach(message, fds)

    async def _attach(self, message: dict[str, Any], fds: Sequence[int]) -> Attached:
        name = str(message["name"])
        task = asyncio.ensure_future(
            self._retry_at_limit(name, lambda link: link.attach(message, fds))
        )
        try:
            return await run_to_completion(task)
        except asyncio.CancelledError:
            if not task.cancelled() and task.exception() is None:
                await task.result().kill()
            raise

    async def supervise(self, message: dict[str, Any], fds: list[int], answer: int) -> bytes:
        """Start a command with a supervisor; what that writes to the pipe ``answer``, once it runs.

        That is nothing if it died.  It comes in one piece, and its end is not waited for: what is
        being started has the pipe, too, and somebody inside can stop that before it is closed.

        ``fds`` are the log, the status file, the other end of the pipe, and perhaps what the
        command reads; they are closed, and removed from the list, on every path.  Waits while the
        container's gate is closed.  Raises ContainerPaused, AtLimit, HostFault, LauncherLost,
        TimeoutError.
        """
        name = str(message["name"])
        request = {"do": "supervise", **message}
        async with self.gate.entering(name):
            try:
                await self._retry_at_limit(name, lambda link: link.request(request, fds))
            finally:
                while fds:
                    os.close(fds.pop())
            # Until then it may not be in the container's groups: the gate must not be closed.
            async with asyncio.timeout(scaled(_REQUEST_TIMEOUT_SECONDS)):
                await readable(answer)
                return os.read(answer, _ANSWER_BYTES)

    async def prepare(self, name: str, seconds: float) -> None:
        """Make the first command of a container start sooner, if it comes within this time.

        Does not wait until it is done.  Raises HostError; the command is none the worse for it.
        """
        link = await self._link_for(name)
        await link.request({"do": "prepare", "name": name, "seconds": seconds})

    async def forget(self, name: str) -> None:
        """Make the launchers drop their state of a container that has exited."""
        await self.gate.forget(name)
        await asyncio.gather(*(link.forget(name) for link in self._all))

    async def maintain(self) -> None:
        """Replace launchers that approach a limit, and stop replaced ones that are idle.

        Raises HostError, OSError if no new one can be started; the old ones then stay in use.
        """
        for link in list(self._links):
            used, limit = link.descriptors()
            if used > limit * _MAX_DESCRIPTOR_SHARE:
                _log.error("launcher %d has %d of %d descriptors", link.process.pid, used, limit)
                await self._retire(link)
        for link in [retired for retired in self._retired if retired.idle or not retired.alive]:
            self._retired.remove(link)
            await link.close()

    def pids(self) -> list[int]:
        """The launchers' pids."""
        return [link.process.pid for link in self._all]

    @property
    def _all(self) -> list[Link]:
        return [*self._links, *self._retired]

    async def _retry_at_limit[T](self, name: str, send: Callable[[Link], Awaitable[T]]) -> T:
        """Send a request about a container to a launcher; if that is at a limit, to a new one.

        Raises AtLimit if the new one is at a limit, too: then it is the host's limit.
        """
        link = await self._link_for(name)
        try:
            return await send(link)
        except AtLimit as error:
            try:
                await self._retire(link)
            except (HostError, OSError):
                _log.exception("no other launcher could be started")
                raise error from None
        return await send(await self._link_for(name))

    async def _link_for(self, name: str) -> Link:
        """The launcher that has the container's spawner, unless it is much busier than another."""
        if not all(link.alive for link in self._links):
            await self._replace_dead()
        preferred = self._links[zlib.crc32(name.encode()) % len(self._links)]
        least_busy = min(self._links, key=lambda link: link.load)
        return preferred if preferred.load <= least_busy.load + _MAX_EXTRA_LOAD else least_busy

    async def _open_link(self) -> Link:
        return await Link.open(self._lxcpath, self._log, self._inherited_fds, self._apparmor)

    async def _retire(self, link: Link) -> None:
        """Replace a launcher by a new one; the old one finishes what it has started."""
        async with self._replacing:
            # Another task may have retired it already; and stop if new ones keep failing as well.
            if link not in self._links or len(self._retired) >= _MAX_RETIRED:
                return
            self._links[self._links.index(link)] = await self._open_link()
            self._retired.append(link)

    async def _replace_dead(self) -> None:
        async with self._replacing:
            for index, link in enumerate(self._links):
                if not link.alive:
                    await link.close()
                    self._links[index] = await self._open_link()


def _pop_message(buffer: bytearray) -> dict[str, Any] | None:
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
    """The file that a process executes, as device and inode; None if it has exited."""
    try:
        status = Path(f"/proc/{pid}/exe").stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _lost_error() -> LauncherLost:
    return LauncherLost("What starts containers and commands died, and is replaced; try again.")


def close_all(descriptors: Sequence[int]) -> None:
    """Close descriptors, ignoring those that are already closed."""
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
