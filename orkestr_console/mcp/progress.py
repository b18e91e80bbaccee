"""Signs of life while a tool works: progress notifications, if the client asked for them.

Clients give up after some time without one, usually a minute, and many count from the last.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any

from mcp.server.mcpserver import Context

HEARTBEAT_SECONDS = 10.0


def is_listening(context: Context[Any, Any]) -> bool:
    """Whether the client wants to know of progress (MCP, "Progress")."""
    return "progress_token" in (context.request_context.meta or {})


@asynccontextmanager
async def heartbeat(context: Context[Any, Any]) -> AsyncIterator[None]:
    """Report the seconds that have passed, again and again, until the block ends."""
    if not is_listening(context):
        yield
        return
    beating = asyncio.create_task(beat(context), name="mcp-heartbeat")
    try:
        yield
    finally:
        beating.cancel()


async def beat(context: Context[Any, Any]) -> None:
    """Report the seconds that have passed, for ever."""
    begun = monotonic()
    while True:
        await asyncio.sleep(HEARTBEAT_SECONDS)
        seconds = monotonic() - begun
        await context.report_progress(seconds, message=f"Still running after {seconds:.0f} s.")


class Progress:
    """Progress with a known end, and signs of life in between; for use on one event loop."""

    def __init__(self, context: Context[Any, Any], total: float) -> None:
        self._context = context
        self._total = total
        self._at = 0.0
        self._message = ""

    async def report(self, at: float, message: str) -> None:
        """Report how far it is; nothing happens unless that is further than before.

        It must increase with each notification (MCP, "Progress").
        """
        if at > self._at:
            self._at, self._message = at, message
            await self._context.report_progress(at, self._total, message)

    async def creep(self, message: str, end: float) -> None:
        """Report a part of what is left until ``end``: how much of it is done, nobody knows."""
        await self.report(self._at + max(end - self._at, 0) / 100, message)

    @asynccontextmanager
    async def alive(self) -> AsyncIterator[None]:
        """Repeat the last message until the block ends, if somebody listens."""
        beating = None
        if is_listening(self._context):
            beating = asyncio.create_task(self._beat(), name="mcp-heartbeat")
        try:
            yield
        finally:
            if beating is not None:
                beating.cancel()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            await self.creep(self._message or "Waiting.", self._total - 0.05)
