"""The agent's asynchronous toolbox: what it needs in addition to asyncio.

* :func:`create_thread_pool`;
* work that completes even if the caller is cancelled: :func:`in_thread` and
  :func:`run_to_completion`, which wait for it, and :func:`shielded`, which does not;
* :class:`KeyedLocks`, one lock per name;
* :func:`readable` and :func:`writable`, which wait for a descriptor, :func:`read_to_end`,
  :func:`receive_into` and :func:`send_all`;
* :func:`every` for periodic work, and :func:`log_errors` for work whose failure only gets logged.

The event loop never waits for a disk: what reads or writes a file, a log or a tree runs in a
thread. Control groups and proc(5) are kernel memory, and may be read from anywhere.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from hostruntime.errors import HostError

# Log a failure that repeats itself at most this often.
REPEAT_LOG_SECONDS = 60.0
_READ_BYTES = 64 * 1024
_shielded: set[asyncio.Future[Any]] = set()
_log = logging.getLogger(__name__)


# Work that completes despite cancellation --------------------------------------------------------


def create_thread_pool(count: int) -> ThreadPoolExecutor:
    """Create a pool that starts all of its threads immediately.

    If the machine cannot start a thread, that fails here, and not in the call that would need it.
    Raises RuntimeError.
    """
    pool, all_started = ThreadPoolExecutor(count), threading.Barrier(count)
    for future in [pool.submit(all_started.wait) for _ in range(count)]:
        future.result()
    return pool


class StoppedError(HostError):
    """Work was asked to stop; its result is incomplete."""

    code = "stopped"
    status = 409


class Stop:
    """Stops long work in threads soon after the caller is cancelled."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def check(self) -> None:
        """Called periodically by the work.  Raises StoppedError."""
        if self.event.is_set():
            raise StoppedError("The work was asked to stop.")

    async def in_thread[T](self, function: Callable[..., T], *args: Any) -> T:
        """Run work that calls :meth:`check` in a thread; if cancelled, wait until it stops."""
        return await in_thread(function, *args, on_cancel=self.event.set)


async def in_thread[T](
    function: Callable[..., T], *args: Any, on_cancel: Callable[[], None] | None = None
) -> T:
    """Run ``function`` in a thread; if cancelled, wait for it to finish before raising.

    ``on_cancel`` is called immediately on cancellation, to make the function finish soon.
    """
    return await run_to_completion(asyncio.to_thread(function, *args), on_cancel)


async def run_to_completion[T](
    awaitable: Awaitable[T], on_cancel: Callable[[], None] | None = None
) -> T:
    """Await something; if cancelled, wait for it to finish before raising CancelledError."""
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
        _log.info("cancelled work failed: %s", failure)
    raise cancelled


async def shielded[T](awaitable: Awaitable[T]) -> T:
    """Await something that keeps running if the caller is cancelled, which happens immediately.

    What it raises after the caller was cancelled is logged.
    """
    work = asyncio.ensure_future(awaitable)
    # asyncio itself keeps only weak references to tasks.
    _shielded.add(work)
    work.add_done_callback(_shielded.discard)
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        work.add_done_callback(_log_failure)
        raise


def _log_failure(work: asyncio.Future[Any]) -> None:
    if not work.cancelled() and (failure := work.exception()) is not None:
        _log.info("work whose caller was cancelled failed: %s", failure)


# Locks -------------------------------------------------------------------------------------------


class KeyedLocks:
    """A lock for each name in use.  For use on one event loop."""

    def __init__(self) -> None:
        self._locks: dict[str, asyncio.Lock] = {}
        # How many hold or wait for each lock.
        self._users: Counter[str] = Counter()

    @asynccontextmanager
    async def holding(self, key: str) -> AsyncIterator[None]:
        """Hold the lock of that name for the duration of the block."""
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
    """Wait until a descriptor is readable or at its end."""
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)


async def writable(descriptor: int) -> None:
    """Wait until a descriptor is writable."""
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_writer(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_writer(descriptor)


async def read_to_end(descriptor: int) -> bytes:
    """Read a pipe until its last writer has closed it.  Raises OSError."""
    os.set_blocking(descriptor, False)
    data = b""
    while True:
        try:
            part = os.read(descriptor, _READ_BYTES)
        except BlockingIOError:
            await readable(descriptor)
            continue
        if not part:
            return data
        data += part


async def receive_into(sock: socket.socket, buffer: memoryview, seconds: float | None) -> int:
    """What a non-blocking socket has, which others don't wait for; the bytes, 0 at its end.

    Raises OSError, and TimeoutError if nothing comes for so long.
    """
    # Otherwise a peer that is always ready would keep the event loop.
    await asyncio.sleep(0)
    while True:
        try:
            return sock.recv_into(buffer)
        except BlockingIOError:
            async with asyncio.timeout(seconds):
                await readable(sock.fileno())


async def send_all(sock: socket.socket, data: bytes | memoryview, seconds: float) -> None:
    """Send everything through a non-blocking socket.

    Raises OSError, and TimeoutError if nothing is taken for so long.
    """
    left = memoryview(data)
    while left:
        try:
            left = left[sock.send(left) :]
        except BlockingIOError:
            async with asyncio.timeout(seconds):
                await writable(sock.fileno())


# Background and periodic work --------------------------------------------------------------------


@contextmanager
def log_errors(description: str) -> Iterator[None]:
    """Log whatever the block raises, and suppress it.  Usable in threads, too.

    A HostError or OSError is logged on one line, anything else with its traceback.
    """
    try:
        yield
    except Exception as error:  # noqa: BLE001 - the log is the only place to report it
        _log_error(description, error)


def _log_error(description: str, error: BaseException) -> None:
    expected = isinstance(error, HostError | OSError)
    _log.error(
        "%s: %s", description, error or type(error).__name__, exc_info=None if expected else error
    )


def every(
    seconds: float | Callable[[], float],
    work: Callable[[], Awaitable[None]],
    description: str,
    *,
    immediately: bool = False,
) -> asyncio.Task[None]:
    """Run ``work`` periodically until the returned task is cancelled.

    ``seconds`` is the time between the end of one run and the start of the next; a function is
    called each time.  Whatever a run raises is logged, prefixed with ``description``, and does not
    prevent the next.  ``immediately`` skips the wait before the first run.
    """
    return asyncio.create_task(_repeat(seconds, work, description, immediately), name=description)


async def _repeat(
    seconds: float | Callable[[], float],
    work: Callable[[], Awaitable[None]],
    description: str,
    immediately: bool,
) -> None:
    last_logged: tuple[str, float] = ("", 0.0)
    wait = not immediately
    while True:
        if wait:
            await asyncio.sleep(seconds if isinstance(seconds, float | int) else seconds())
        wait = True
        try:
            await work()
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and _is_cancelled():
                raise
            last_logged = _log_unless_repeated(description, error, last_logged)
        else:
            last_logged = ("", 0.0)


def _is_cancelled() -> bool:
    """Whether the running task itself was cancelled, rather than what it awaited."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


def _log_unless_repeated(
    description: str, error: BaseException, last_logged: tuple[str, float]
) -> tuple[str, float]:
    now, failure = time.monotonic(), repr(error)
    if last_logged[0] == failure and now < last_logged[1] + REPEAT_LOG_SECONDS:
        return last_logged
    _log_error(description, error)
    return failure, now


async def cancel_and_wait(*tasks: asyncio.Task[None] | None) -> None:
    """Cancel tasks and wait until they have finished."""
    pending = [task for task in tasks if task is not None]
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)


def in_background(work: Coroutine[Any, Any, None], description: str) -> asyncio.Task[None]:
    """Start work that nobody awaits; what it raises is logged.  Keep a reference to the task."""
    return asyncio.create_task(_run_logged(work, description), name=description)


async def _run_logged(work: Coroutine[Any, Any, None], description: str) -> None:
    with log_errors(description):
        await work
