"""How far long work is: counted by the thread that does it, told by the event loop."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from hostruntime.host.tasks import end, every

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

    async def say() -> None:
        tell()

    teller = every(TELL_SECONDS, say, "how far work is could not be told")
    try:
        yield
    finally:
        await end(teller)
