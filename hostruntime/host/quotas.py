"""How many commands may run at once in a scope, of which the host knows no more than the name.

Only who runs the commands can count them: a caller that dies tells nobody, and there may be many.
So a caller says with each command how many its scope may have, and the answer is given here, from
those that run. A command counts until no process of it is left; an agent that starts has ended
what an earlier one ran (:meth:`hostruntime.container.manager.ContainerManager.adopt`), and counts
from none.
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
    """The commands that run now, by scope. For one event loop."""

    _running: Counter[str] = field(default_factory=Counter)

    def by_scope(self) -> dict[str, int]:
        """How many run of each scope that has any."""
        return dict(self._running)

    @contextmanager
    def one_more(self, quota: Quota | None) -> Iterator[None]:
        """Count a command for the length of a block. Raises TooManyCommands; then it counts not."""
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
