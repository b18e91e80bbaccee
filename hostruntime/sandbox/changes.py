"""Which sandboxes have ended by themselves, or stand still or run on, for who waits to hear of it.

Changes are numbered, each *run* of the agent its own.  Whoever has heard up to a number is told
what came after it; one who comes from another run, or from before what is remembered, is told that
something may be missing, and compares everything instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections import deque
from dataclasses import dataclass

HISTORY_LENGTH = 4096


@dataclass(frozen=True)
class ChangeSet:
    """The sandboxes that changed after some number, up to ``seq``; not all unless ``whole``.

    ``run`` is what the number is of.
    """

    run: str
    seq: int
    complete: bool
    ids: tuple[str, ...] = ()


class Changes:
    """The changes of one run of the agent.  For one event loop."""

    def __init__(self) -> None:
        self._run = secrets.token_hex(8)
        self._seq = 0
        self._ids: deque[str] = deque(maxlen=HISTORY_LENGTH)
        self._changed = asyncio.Event()
        self._closed = False

    def record(self, sandbox_id: str) -> None:
        """One has ended, or was paused or resumed."""
        self._seq += 1
        self._ids.append(sandbox_id)
        self._wake()

    def close(self) -> None:
        """Nobody waits any longer: the agent is about to go."""
        self._closed = True
        self._wake()

    async def after(self, run: str, seq: int, seconds: float) -> ChangeSet:
        """What has changed after number ``seq`` of ``run``; waits so long for the first."""
        complete = run == self._run and self._seq - len(self._ids) <= seq <= self._seq
        if complete:
            await self._wait_for_change(seq, seconds)
            # While this waited more may have changed than is remembered.
            complete = self._seq - len(self._ids) <= seq
        count = self._seq - seq if complete else 0
        return ChangeSet(self._run, self._seq, complete, tuple(self._ids)[len(self._ids) - count :])

    async def _wait_for_change(self, seq: int, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._seq == seq and not self._closed:
                    await self._changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
