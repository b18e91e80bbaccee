"""The threads that requests run in, and how the event loop has something done in one.

Like ``ThreadPoolExecutor``, but a thread ends that was not needed for a while, so that a burst of
requests does not leave its threads behind.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextvars import ContextVar, copy_context
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from asgiref.sync import sync_to_async

from orkestr_console.core.postgres import release_connection

IDLE_SECONDS = 30.0

type Call = tuple[Future[Any], Callable[[], Any]]

# A view keeps one while it waits for a host; plans limit what may be under way concurrently.
MAX_VIEWS = 4096
# A part is over soon, so no more than can share the database's connections, and some to spare.
MAX_PARTS = 32

# Each holder of a turn holds a connection, and is over soon as well.
MAX_TURNS = 8

# Those of the server that runs the current request; none outside of one.
server_threads: ContextVar[ServerThreads | None] = ContextVar("server_threads", default=None)


class RequestThreads(Executor):
    """At most ``most`` threads; a call gets the idle one that was used last, else a new one."""

    def __init__(self, most: int, idle_seconds: float = IDLE_SECONDS) -> None:
        self._most = most
        self._idle_seconds = idle_seconds
        self._lock = threading.Lock()
        self._started = 0
        # The inboxes of idle threads.
        self._idle: list[SimpleQueue[Call]] = []
        # Calls that no thread was left for.
        self._waiting: deque[Call] = deque()

    def submit[**P, R](self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Run a call in a thread."""
        future: Future[R] = Future()
        call = future, partial(fn, *args, **kwargs)
        with self._lock:
            if self._idle:
                self._idle.pop().put(call)
            elif self._started < self._most:
                self._start(call)
            else:
                self._waiting.append(call)
        return future

    def _start(self, call: Call) -> None:
        inbox: SimpleQueue[Call] = SimpleQueue()
        inbox.put(call)
        # Daemons: what a thread is stuck in must not keep the process from ending.
        threading.Thread(target=self._work, args=[inbox], name="request", daemon=True).start()
        self._started += 1

    def _work(self, inbox: SimpleQueue[Call]) -> None:
        while True:
            try:
                future, function = inbox.get(timeout=self._idle_seconds)
            except Empty:
                if self._retire(inbox):
                    return
                continue
            tell = run(future, function)
            # Idle before the caller learns the outcome: its next call needs no other thread.
            self._next(inbox)
            tell()
            # No reference to a request remains while the thread is idle.
            del future, function, tell

    def _next(self, inbox: SimpleQueue[Call]) -> None:
        with self._lock:
            if self._waiting:
                inbox.put(self._waiting.popleft())
            else:
                self._idle.append(inbox)

    def _retire(self, inbox: SimpleQueue[Call]) -> bool:
        with self._lock:
            if inbox not in self._idle:
                # A call has just been put in.
                return False
            self._idle.remove(inbox)
            self._started -= 1
            return True


class ServerThreads:
    """A server's threads: of whole views, which may wait for a host, and of short parts of some.

    A part may wait for a turn, and as many of them could have all threads. So whose turn it is
    (:mod:`orkestr_console.accounts.turns`) goes on in others.
    """

    def __init__(self) -> None:
        self.views = RequestThreads(MAX_VIEWS)
        self.parts = RequestThreads(MAX_PARTS)
        self.turns = RequestThreads(MAX_TURNS)


async def in_thread[**P, R](call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run a short part of a request in a thread, such as what reads rows.

    Waits on the event loop; there is no database connection left afterwards. If this is cancelled,
    the part still runs to its end, unless it was waiting for a thread. Outside of the server it
    runs in the thread that called into the event loop, whose connection and transaction it shares.
    """
    threads = server_threads.get()
    return await _run_in(threads.parts if threads else None, partial(call, *args, **kwargs))


async def turn_in_thread[**P, R](call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run the part for which a turn was waited for; else as :func:`in_thread`."""
    threads = server_threads.get()
    return await _run_in(threads.turns if threads else None, partial(call, *args, **kwargs))


async def view_in_thread[**P, R](view: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run a whole view in a thread, however long it takes; else as :func:`in_thread`."""
    threads = server_threads.get()
    return await _run_in(threads.views if threads else None, partial(view, *args, **kwargs))


async def _run_in[R](threads: RequestThreads | None, call: Callable[[], R]) -> R:
    if threads is None:
        return await sync_to_async(_releasing)(call)
    return await asyncio.wrap_future(threads.submit(copy_context().run, _releasing, call))


def _releasing[R](call: Callable[[], R]) -> R:
    try:
        return call()
    finally:
        release_connection()


def run(future: Future[Any], function: Callable[[], Any]) -> Callable[[], None]:
    """Run a call unless it was cancelled; returns what tells its outcome."""
    if not future.set_running_or_notify_cancel():
        return lambda: None
    try:
        return partial(future.set_result, function())
    except BaseException as error:  # noqa: BLE001 - the caller has it
        tell = partial(future.set_exception, error)
        # The error's traceback has this frame, which must not refer to the error in turn.
        del future, function
        return tell
