"""The asynchronous toolbox: what the agent needs beside asyncio, once.

* :func:`threads`, a pool of them;
* work that is finished although whoever waits for it is cancelled: :func:`in_thread`,
  :func:`to_the_end`, which wait for the end, and :func:`unbroken`, which does not;
* :class:`KeyedLocks`, one lock for each of any number of names;
* :func:`readable` and :func:`writable`, which wait for a descriptor;
* :func:`every` for what is done again and again, and :func:`logged` for what may fail by itself.

The event loop waits for no disk: what reads or writes a file, a log or a tree goes to a thread.
Control groups and proc(5) are the kernel's memory, and may be looked at from anywhere.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from hostruntime.errors import HostError

# What fails again and again in the same way is said once in so many seconds.
SAY_AGAIN_SECONDS = 60.0
_unbroken: set[asyncio.Future[Any]] = set()
_log = logging.getLogger(__name__)


# Work that is not torn ---------------------------------------------------------------------------


def threads(count: int) -> ThreadPoolExecutor:
    """A pool whose threads are all there from the start.

    One that the machine has no room for fails here, and not the call that would need it.
    Raises RuntimeError.
    """
    pool, all_there = ThreadPoolExecutor(count), threading.Barrier(count)
    for waiting in [pool.submit(all_there.wait) for _ in range(count)]:
        waiting.result()
    return pool


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


async def unbroken[T](awaitable: Awaitable[T]) -> T:
    """Await something that goes on to its end although the caller is cancelled, which is at once.

    What it raises when nobody waits any more goes to the log.
    """
    work = asyncio.ensure_future(awaitable)
    # asyncio itself holds no task that somebody does not wait for.
    _unbroken.add(work)
    work.add_done_callback(_unbroken.discard)
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        work.add_done_callback(_say_failure)
        raise


def _say_failure(work: asyncio.Future[Any]) -> None:
    if not work.cancelled() and (failure := work.exception()) is not None:
        _log.info("work that nobody waited for any more ended by %s", failure)


# Turns -------------------------------------------------------------------------------------------


class KeyedLocks:
    """A lock for each name that is in use, and none for the others.  For one event loop."""

    def __init__(self) -> None:
        self._locks: dict[str, asyncio.Lock] = {}
        # Who holds one or waits for it.
        self._users: Counter[str] = Counter()

    @asynccontextmanager
    async def holding(self, key: str) -> AsyncIterator[None]:
        """Hold the lock of that name in here; nobody else does."""
        lock = self._locks.setdefault(key, asyncio.Lock())
        self._users[key] += 1
        try:
            async with lock:
                yield
        finally:
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key], self._locks[key]

    def __len__(self) -> int:
        """How many names are in use."""
        return len(self._locks)


# Descriptors -------------------------------------------------------------------------------------


async def readable(descriptor: int) -> None:
    """Wait until something can be read from a descriptor, or it has come to its end."""
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)


async def writable(descriptor: int) -> None:
    """Wait until something can be written to a descriptor."""
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_writer(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_writer(descriptor)


# What goes on by itself --------------------------------------------------------------------------


@contextmanager
def logged(what: str) -> Iterator[None]:
    """Whatever is raised in here goes to the log, and no further.  In threads, too.

    A HostError or OSError is told in a line, a defect with its traceback.
    """
    try:
        yield
    except Exception as error:  # noqa: BLE001 - the log is the only place to tell
        _tell(what, error)


def _tell(what: str, error: BaseException) -> None:
    known = isinstance(error, HostError | OSError)
    _log.error("%s: %s", what, error or type(error).__name__, exc_info=None if known else error)


def every(
    seconds: float | Callable[[], float],
    work: Callable[[], Awaitable[None]],
    what: str,
    *,
    at_once: bool = False,
) -> asyncio.Task[None]:
    """Do ``work`` every so many seconds until the task that is returned is cancelled.

    The seconds are between the end of one round and the next; a function is asked anew each time.
    Whatever a round raises is logged, with ``what`` before it, and the next one comes all the
    same.  ``at_once`` does not wait before the first.
    """
    return asyncio.create_task(_again_and_again(seconds, work, what, at_once), name=what)


async def _again_and_again(
    seconds: float | Callable[[], float],
    work: Callable[[], Awaitable[None]],
    what: str,
    at_once: bool,
) -> None:
    said: tuple[str, float] = ("", 0.0)
    wait = not at_once
    while True:
        if wait:
            await asyncio.sleep(seconds if isinstance(seconds, float | int) else seconds())
        wait = True
        try:
            await work()
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and _is_cancelled():
                raise
            said = _tell_anew(what, error, said)
        else:
            said = ("", 0.0)


def _is_cancelled() -> bool:
    """Whether the running task itself was cancelled, and not what it waited for."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


def _tell_anew(what: str, error: BaseException, said: tuple[str, float]) -> tuple[str, float]:
    now, failure = time.monotonic(), repr(error)
    if said[0] == failure and now < said[1] + SAY_AGAIN_SECONDS:
        return said
    _tell(what, error)
    return failure, now


async def end(*tasks: asyncio.Task[None] | None) -> None:
    """Cancel tasks, and wait until they have ended."""
    there = [task for task in tasks if task is not None]
    for task in there:
        task.cancel()
    await asyncio.gather(*there, return_exceptions=True)


def in_background(work: Coroutine[Any, Any, None], what: str) -> asyncio.Task[None]:
    """Begin something that nobody waits for: what it raises is logged.  Keep the task."""
    return asyncio.create_task(_logged(work, what), name=what)


async def _logged(work: Coroutine[Any, Any, None], what: str) -> None:
    with logged(what):
        await work
