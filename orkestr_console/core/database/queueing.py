"""Waiting for one of a few connections, in the order of arrival."""

from __future__ import annotations

import threading
import time
from collections import deque


class Queue:
    """Places for as many holders as there are connections; others wait in order.

    A burst is worked off, however long it is, so nobody is sent away while places become free. But
    a database that is away frees none in earnest: whoever has waited ``stalled_seconds``, in which
    no holder had been served, has waited in vain.
    """

    def __init__(self, places: int, stalled_seconds: float, longest_seconds: float) -> None:
        self._stalled_seconds = stalled_seconds
        self._longest_seconds = longest_seconds
        self._guard = threading.Lock()
        self._free = places
        self._waiting: deque[threading.Event] = deque()
        self._last_served = time.monotonic()

    def enter(self) -> bool:
        """Take a place; False if that was in vain, or took longer than ``longest_seconds``."""
        with self._guard:
            if self._free:
                self._free -= 1
                return True
            called = threading.Event()
            self._waiting.append(called)
        began = time.monotonic()
        while not called.wait(self._deadline(began) - time.monotonic()):
            with self._guard:
                if called.is_set():
                    break
                if time.monotonic() >= self._deadline(began):
                    self._waiting.remove(called)
                    return False
        return True

    def _deadline(self, began: float) -> float:
        stalled = max(began, self._last_served) + self._stalled_seconds
        return min(stalled, began + self._longest_seconds)

    def leave(self, *, served: bool) -> None:
        """Give the place to who has waited longest; ``served`` if a connection came with it."""
        with self._guard:
            if served:
                self._last_served = time.monotonic()
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._free += 1
