"""Taking turns at a team's row, without holding a database connection meanwhile.

Whoever creates something locks the team's row (:func:`orkestr_console.accounts.limits.held`).
Without turns, a burst of one team would sit on all connections of the pool, each waiting for the
same lock, and every other team would wait with it. A service in steps also waits without a thread.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from orkestr_console.core.hosts import Steps
from orkestr_console.core.postgres import release_connection


class Turns:
    """One holder of each name at a time, in this process; others wait in order."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        # For each name that somebody holds, those who wait for it.
        self._waiting: dict[str, deque[Future[None]]] = {}

    @contextmanager
    def turn(self, name: str) -> Iterator[None]:
        """Wait for one's turn; this thread's connection goes back to the pool first."""
        mine = self._register(name)
        if not mine.done():
            release_connection()
            mine.result()
        with self.taken(name):
            yield

    def wait(self, name: str) -> Steps[None]:
        """The same wait as a step. What follows at once is ``with taken(name)``."""
        mine = self._register(name)
        try:
            if not mine.done():
                yield mine
        except BaseException:
            # Its turn may have come nevertheless.
            if not mine.cancel():
                self._pass_on(name)
            raise

    @contextmanager
    def taken(self, name: str) -> Iterator[None]:
        """Whose turn it is; whoever waits is next."""
        try:
            yield
        finally:
            self._pass_on(name)

    def _register(self, name: str) -> Future[None]:
        mine: Future[None] = Future()
        with self._guard:
            if name in self._waiting:
                self._waiting[name].append(mine)
                return mine
            self._waiting[name] = deque()
        mine.set_result(None)
        return mine

    def _pass_on(self, name: str) -> None:
        with self._guard:
            waiting = self._waiting[name]
            while waiting:
                # Not whoever has given up.
                if (following := waiting.popleft()).set_running_or_notify_cancel():
                    break
            else:
                del self._waiting[name]
                return
        following.set_result(None)


_turns = Turns()
turn, wait, taken = _turns.turn, _turns.wait, _turns.taken
