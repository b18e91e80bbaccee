"""Who may attach to a container now: nobody, while it is frozen.

A process that is attached enters the container's control group, and stops there if that is frozen,
with the launcher that attaches it, which serves every other container as well.  So whoever freezes
a container shuts its gate first, which waits for those who are on their way in.

A gate is shut for a moment, barred while somebody has paused the container, and held while the
machine is short of what the container takes; each of these whatever the others are.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from hostruntime.errors import ContainerPaused, Held


class Gate:
    """The gates of all containers, by name.  Belongs to one event loop."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._entering: Counter[str] = Counter()
        self._shut: set[str] = set()
        self._barred: set[str] = set()
        self._held: dict[str, str | None] = {}

    @asynccontextmanager
    async def entering(self, name: str) -> AsyncIterator[None]:
        """Attach in here; waits as long as the container's gate is shut.

        Raises ContainerPaused while it is barred, and Held while it is held with words for that.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: not self._keeps_waiting(name))
            if name in self._barred:
                raise ContainerPaused("The sandbox is paused; resume it first.")
            if words := self._held.get(name):
                raise Held(words)
            self._entering[name] += 1
        try:
            yield
        finally:
            self._entering[name] -= 1
            if not self._entering[name]:
                del self._entering[name]
            await self._tell()

    @asynccontextmanager
    async def shut(self, name: str) -> AsyncIterator[None]:
        """Keep everybody out, as soon as those on their way in have arrived."""
        async with self._changed:
            await self._changed.wait_for(lambda: name not in self._shut)
            self._shut.add(name)
        try:
            async with self._changed:
                await self._changed.wait_for(lambda: not self._entering[name])
            yield
        finally:
            self._shut.discard(name)
            await self._tell()

    async def bar(self, name: str) -> None:
        """Keep everybody out until :meth:`admit`; waits for those on their way in."""
        self._barred.add(name)
        async with self._changed:
            await self._changed.wait_for(
                lambda: not self._entering[name] and name not in self._shut
            )

    def admit(self, name: str) -> None:
        """Let everybody in again."""
        self._barred.discard(name)

    def is_barred(self, name: str) -> bool:
        """Whether it is barred."""
        return name in self._barred

    async def hold(self, name: str, words: str | None) -> None:
        """Keep everybody out until :meth:`let_go`; waits for those on their way in.

        Who comes is told ``words``; without any, they wait.
        """
        self._held[name] = words
        async with self._changed:
            await self._changed.wait_for(
                lambda: not self._entering[name] and name not in self._shut
            )

    async def let_go(self, name: str) -> None:
        """Hold it no more."""
        self._held.pop(name, None)
        await self._tell()

    async def forget(self, name: str) -> None:
        """The container is gone: neither barred nor held."""
        self.admit(name)
        await self.let_go(name)

    def _keeps_waiting(self, name: str) -> bool:
        return name in self._shut or (name in self._held and self._held[name] is None)

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()
