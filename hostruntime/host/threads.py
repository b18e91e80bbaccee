"""Work that is waited for to its end, for code that can be cancelled meanwhile."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from hostruntime.errors import HostError

_log = logging.getLogger(__name__)


class StoppedError(HostError):
    """Work was asked to stop; what it was making is half made."""

    code = "stopped"
    status = 409


class Stop:
    """Ends long work in threads soon after whoever waits for it is cancelled."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def check(self) -> None:
        """Called by the work between its pieces.  Raises StoppedError."""
        if self.event.is_set():
            raise StoppedError("The work was asked to stop.")

    async def in_thread[T](self, function: Callable[..., T], *args: Any) -> T:
        """Run work that looks at this in a thread, to its end, which comes soon if cancelled."""
        return await in_thread(function, *args, on_cancel=self.event.set)


async def in_thread[T](
    function: Callable[..., T], *args: Any, on_cancel: Callable[[], None] | None = None
) -> T:
    """Run ``function`` in a thread, to its end even when cancelled, and only then be cancelled.

    ``on_cancel`` is called at once, to make the function end soon.
    """
    return await to_the_end(asyncio.to_thread(function, *args), on_cancel)


async def to_the_end[T](awaitable: Awaitable[T], on_cancel: Callable[[], None] | None = None) -> T:
    """Await something, to its end even when cancelled, and only then be cancelled."""
    work = asyncio.ensure_future(awaitable)
    cancelled: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError as error:
            cancelled = error
            if on_cancel is not None:
                on_cancel()
    if cancelled is None:
        return work.result()
    failure = None if work.cancelled() else work.exception()
    if failure is not None and not isinstance(failure, StoppedError):
        _log.info("cancelled work ended by %s", failure)
    raise cancelled
