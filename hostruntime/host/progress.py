"""Progress of long work: counted by the thread that does it, reported by the event loop."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from hostruntime.host.tasks import cancel_and_wait, every

# Clients are promised a report every second; a busy loop may be a little late.
REPORT_SECONDS = 0.8


@dataclass
class Progress:
    """What has been processed so far: names that are not directories, and bytes of content.

    One thread counts; others may read at any time.
    """

    files: int = 0
    bytes: int = 0


@asynccontextmanager
async def reporting(report: Callable[[], None]) -> AsyncIterator[None]:
    """Call ``report`` every :data:`REPORT_SECONDS` until the block ends."""

    async def call_report() -> None:
        report()

    reporter = every(REPORT_SECONDS, call_report, "progress could not be reported")
    try:
        yield
    finally:
        await cancel_and_wait(reporter)
