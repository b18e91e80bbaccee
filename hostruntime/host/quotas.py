"""How many commands may run concurrently in a scope, which the host knows only by name.

Only the process that runs the commands can count them: a caller that dies cannot report it, and
there may be many callers. So a caller sends its scope's limit with each command, and this module
checks it against the commands that are running. A command counts until none of its processes is
left. An agent that starts has killed what an earlier one ran
(:meth:`hostruntime.container.manager.ContainerManager.adopt`), and counts from zero.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from hostruntime.errors import TooManyCommands
from hostruntime.wire.commands import Quota


@dataclass
class RunningCommands:
    """The running commands by scope. For use on one event loop."""

    _running: Counter[str] = field(default_factory=Counter)

    def by_scope(self) -> dict[str, int]:
        """The number of running commands of each scope that has any."""
        return dict(self._running)

    @contextmanager
    def track(self, quota: Quota | None) -> Iterator[None]:
        """Count a command for the duration of a block. Raises TooManyCommands before counting."""
        if quota is None:
            yield
            return
        running = self._running[quota.scope]
        if running >= quota.most:
            if not running:
                del self._running[quota.scope]
            raise TooManyCommands(
                f"{running} commands run at once, which is all that may; wait until one ends.",
                running=running,
            )
        self._running[quota.scope] += 1
        try:
            yield
        finally:
            self._running[quota.scope] -= 1
            if not self._running[quota.scope]:
                del self._running[quota.scope]
