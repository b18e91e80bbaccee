"""Connections to ports inside containers, opened in their network namespace.

The socket belongs to the container's namespace for life (network_namespaces(7)), whoever holds it,
so that it reaches servers on the container's loopback, and no firewall of the host's or of the
container's slot has a part in it.

The namespace must be that of the right container: its path and its slot are soon another's.  So it
is joined by a pidfd of the container's init (setns(2)), and the container must still be the same
once the connection stands.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from hostruntime.container.cgroups import ContainerGroups, cgroup_layout, pids_under
from hostruntime.container.dismantling import open_pidfd
from hostruntime.container.manager import ContainerManager, RunningContainer
from hostruntime.container.spawner import has_exited
from hostruntime.errors import ContainerGone, HostError, HostFault, PortClosed
from hostruntime.host.patience import scaled
from hostruntime.host.tasks import in_thread

# Both loopback addresses: some programs listen on the second alone if told `localhost`.
_LOOPBACKS = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))
# A server that accepts nothing has its queue full (listen(2)): the kernel just tries again.
_CONNECT_SECONDS = 5.0
# Of all containers: each has two threads.
_THREADS_AT_ONCE = 16
# Of one container, whose servers may let everybody wait: it is not to keep others' from theirs, nor
# to have the descriptors of those who wait use up the agent's.
_AT_ONCE = 16
MAX_WAITING = 128


@dataclass
class _Queue:
    """Those who connect to one container, or wait for their turn."""

    turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_AT_ONCE))
    users: int = 0


@dataclass
class PortService:
    """Connects to ports of containers.  For use on one event loop."""

    containers: ContainerManager
    _threads: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_THREADS_AT_ONCE))
    _queues: dict[str, _Queue] = field(default_factory=dict)

    async def connect(self, owner: str, port: int) -> socket.socket:
        """A non-blocking socket, connected to ``port`` of a container's loopback.

        Raises PortClosed, ContainerGone, HostFault.
        """
        running = self.containers.get(owner)
        async with self._turn(owner):
            # What a thread opens for who leaves meanwhile is closed as well.
            opened: list[int] = []
            groups = cgroup_layout().container(running.name)
            try:
                async with self._threads:
                    await in_thread(lambda: opened.append(_pin(running, groups)))
                (pidfd,) = opened
                connected = await self._connect(pidfd, port)
                if not self._is_still(running, pidfd):
                    connected.close()
                    raise _gone(owner)
                return connected
            finally:
                for descriptor in opened:
                    os.close(descriptor)

    @asynccontextmanager
    async def _turn(self, owner: str) -> AsyncIterator[None]:
        queue = self._queues.setdefault(owner, _Queue())
        if queue.users >= MAX_WAITING:
            raise PortClosed("Too many connections to the sandbox wait for its servers; try again.")
        queue.users += 1
        try:
            async with queue.turns:
                yield
        finally:
            queue.users -= 1
            if not queue.users:
                del self._queues[owner]

    def _is_still(self, running: RunningContainer, pidfd: int) -> bool:
        """Whether the namespace that was connected to is still that of the owner's container."""
        try:
            return self.containers.get(running.owner) is running and not has_exited(pidfd)
        except ContainerGone:
            return False

    async def _connect(self, pidfd: int, port: int) -> socket.socket:
        for family, address in _LOOPBACKS:
            async with self._threads:
                made = await in_thread(socket_inside, pidfd, family)
            if made is None:
                continue
            try:
                await _connect_within(made, address, port)
            except ConnectionRefusedError:
                made.close()
                continue
            except (OSError, TimeoutError) as error:
                made.close()
                raise PortClosed(
                    f"What listens on port {port} of the sandbox accepts no connection: {error}."
                ) from error
            except BaseException:
                made.close()
                raise
            return made
        raise PortClosed(f"Nothing in the sandbox listens on port {port}.")


def _pin(running: RunningContainer, groups: ContainerGroups) -> int:
    """A pidfd of a container's init.  Raises ContainerGone."""
    pidfd = open_pidfd(running.init_pid)
    if pidfd is None:
        raise _gone(running.owner)
    # The pid may have been reused before the call: then that process is not in these groups.
    if running.init_pid not in pids_under(groups.unified) or has_exited(pidfd):
        os.close(pidfd)
        raise _gone(running.owner)
    return pidfd


def socket_inside(pidfd: int, family: socket.AddressFamily) -> socket.socket | None:
    """A new TCP socket in a process's network namespace; None if the kernel lacks the family.

    Raises ContainerGone if the process has exited, and HostFault.
    """
    # The thread ends with it: a thread that changed its namespace is never reused.
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="port") as pool:
        try:
            return pool.submit(_make_inside, pidfd, family).result()
        except OSError as error:
            if error.errno in {errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT}:
                return None
            if error.errno == errno.ESRCH:
                raise ContainerGone("The sandbox has just ended.") from error
            raise HostFault(f"The sandbox's network cannot be entered: {error}.") from error


def _make_inside(pidfd: int, family: socket.AddressFamily) -> socket.socket:
    os.setns(pidfd, os.CLONE_NEWNET)
    made = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


async def _connect_within(made: socket.socket, address: str, port: int) -> None:
    async with asyncio.timeout(scaled(_CONNECT_SECONDS)):
        await asyncio.get_running_loop().sock_connect(made, (address, port))
    # Where nobody listens, the kernel may choose the same port for both ends, which then meet.
    if made.getsockname()[:2] == made.getpeername()[:2]:
        raise ConnectionRefusedError


def _gone(owner: str) -> HostError:
    return ContainerGone(f"The container of {owner} is not running.")
