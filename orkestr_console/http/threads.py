"""The threads that requests run in.

Like ``ThreadPoolExecutor``, but a thread ends that was not needed for a while, so that a burst of
requests does not leave its threads behind.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

IDLE_SECONDS = 30.0

type Call = tuple[Future[Any], Callable[[], Any]]


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
