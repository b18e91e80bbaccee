"""The part of the host agent in memory that tells of changes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

from hostruntime.wire.sandboxes import ChangesInfo

if TYPE_CHECKING:
    from tests.fakes.host import FakeSandbox


class FakeChanges:
    """``changes``, of which it forgets nothing within a run."""

    lock: threading.Condition
    _up: Callable[[], None]
    booted: dict[str, FakeSandbox]

    run = "run-1"

    @cached_property
    def changed(self) -> list[str]:
        """The sandboxes of this run's changes, in order."""
        return []

    def note_change(self, sandbox_id: str) -> None:
        """A sandbox ended, or was paused or resumed."""
        with self.lock:
            self.changed.append(sandbox_id)
            self.lock.notify_all()

    def changes(self, run: str, after: int, *, seconds: float) -> ChangesInfo:
        """As the client."""
        self._up()
        with self.lock:
            whole = run == self.run
            if whole:
                self.lock.wait_for(lambda: len(self.changed) > after, seconds)
            new = set(self.changed[after:]) if whole else ()
            found = tuple(self.booted[one].info for one in new if one in self.booted)
            return ChangesInfo(self.run, len(self.changed), whole, found)
