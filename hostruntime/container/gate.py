"""Admission to containers: nothing may attach to a container while it is frozen.

A process that attaches enters the container's control group, and hangs there if the group is
frozen, together with the launcher that attaches it, which serves every other container as well.
So a container's gate must be closed before it is frozen; that waits for attaches in progress.

A gate is closed for a moment, blocked while the container is paused, and held while the machine is
short of disk space; these states are independent of each other.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from hostruntime.errors import ContainerPaused, Held


class Gate:
    """The gates of all containers, by name.  For use on one event loop."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._entering: Counter[str] = Counter()
        self._closed: set[str] = set()
        self._blocked: set[str] = set()
        self._held: dict[str, str | None] = {}

    @asynccontextmanager
    async def entering(self, name: str) -> AsyncIterator[None]:
        """Attach within this block; waits while the container's gate is closed.

        Raises ContainerPaused while it is blocked, and Held while it is held with a reason.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: not self._must_wait(name))
            if name in self._blocked:
                raise ContainerPaused("The sandbox is paused; resume it first.")
            if reason := self._held.get(name):
                raise Held(reason)
            self._entering[name] += 1
        try:
            yield
        finally:
            self._entering[name] -= 1
            if not self._entering[name]:
                del self._entering[name]
            await self._notify()

    @asynccontextmanager
    async def closed(self, name: str) -> AsyncIterator[None]:
        """Keep the gate closed in this block, once attaches in progress have completed."""
        async with self._changed:
            await self._changed.wait_for(lambda: name not in self._closed)
            self._closed.add(name)
        try:
            async with self._changed:
                await self._changed.wait_for(lambda: not self._entering[name])
            yield
        finally:
            self._closed.discard(name)
            await self._notify()

    async def block(self, name: str) -> None:
        """Refuse attaches until :meth:`unblock`; waits for those in progress."""
        self._blocked.add(name)
        async with self._changed:
            await self._changed.wait_for(
                lambda: not self._entering[name] and name not in self._closed
            )

    def unblock(self, name: str) -> None:
        """Allow attaches again."""
        self._blocked.discard(name)

    def is_blocked(self, name: str) -> bool:
        """Whether the gate is blocked."""
        return name in self._blocked

    async def hold(self, name: str, reason: str | None) -> None:
        """Keep everybody out until :meth:`release`; waits for attaches in progress.

        Callers get ``reason`` as an error; without one, they wait.
        """
        self._held[name] = reason
        async with self._changed:
            await self._changed.wait_for(
                lambda: not self._entering[name] and name not in self._closed
            )

    async def release(self, name: str) -> None:
        """End a hold."""
        self._held.pop(name, None)
        await self._notify()

    async def forget(self, name: str) -> None:
        """Drop the state of a container that no longer exists."""
        self.unblock(name)
        await self.release(name)

    def _must_wait(self, name: str) -> bool:
        return name in self._closed or (name in self._held and self._held[name] is None)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()
