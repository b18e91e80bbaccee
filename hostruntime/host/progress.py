"""How far long work is: counted by the thread that does it, told by the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

# Watchers are promised a word every second; a busy loop may be a little late.
TELL_SECONDS = 0.8


@dataclass
class Progress:
    """What has been dealt with so far: names that are not directories, and bytes of content.

    One thread counts; others may look at any time.
    """

    files: int = 0
    bytes: int = 0


@asynccontextmanager
async def telling(tell: Callable[[], None]) -> AsyncIterator[None]:
    """Call ``tell`` every :data:`TELL_SECONDS` until the end; of what is over sooner, nothing."""
    teller = asyncio.create_task(_tell_on(tell))
    try:
        yield
    finally:
        teller.cancel()
        await asyncio.gather(teller, return_exceptions=True)


async def _tell_on(tell: Callable[[], None]) -> None:
    while True:
        await asyncio.sleep(TELL_SECONDS)
        tell()
