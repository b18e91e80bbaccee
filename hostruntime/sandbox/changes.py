"""Notifies clients which sandboxes have ended, been paused or been resumed.

Changes are numbered within each *run* of the agent.  A client that knows the changes up to a number
gets those after it; one that comes from another run, or from before the retained history, is told
that changes may be missing, and compares everything instead.
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
    """The sandboxes that changed after some number, up to ``seq`` of ``run``.

    Unless ``complete``, changes may be missing.
    """

    run: str
    seq: int
    complete: bool
    ids: tuple[str, ...] = ()


class Changes:
    """The changes of one run of the agent.  For use on one event loop."""

    def __init__(self) -> None:
        self._run = secrets.token_hex(8)
        self._seq = 0
        self._ids: deque[str] = deque(maxlen=HISTORY_LENGTH)
        self._changed = asyncio.Event()
        self._closed = False

    def record(self, sandbox_id: str) -> None:
        """Record that a sandbox has ended, or was paused or resumed."""
        self._seq += 1
        self._ids.append(sandbox_id)
        self._wake()

    def close(self) -> None:
        """Make all waiting clients return: the agent is about to exit."""
        self._closed = True
        self._wake()

    async def after(self, run: str, seq: int, seconds: float) -> ChangeSet:
        """The changes after number ``seq`` of ``run``; waits ``seconds`` for the first."""
        complete = run == self._run and self._seq - len(self._ids) <= seq <= self._seq
        if complete:
            await self._wait_for_change(seq, seconds)
            # Meanwhile more may have changed than the history retains.
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
