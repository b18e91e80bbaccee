"""Hearing from the host how sandboxes changed, and seeing to what nobody drives any more.

One process of an installation does this (:mod:`orkestr_console.queue.worker`). It asks the agent
which have changed since it last heard, which the agent answers when one has, or after a while.
Nothing is lost: what was heard counts only once it is in the rows, and where something may have
been missed (the first time, after a restart of the agent) all rows are compared with all
containers.
"""

from __future__ import annotations

from orkestr_console.core.hosts import host
from orkestr_console.installation import services as installation
from sandboxes_app.services import lifecycle, settling, standing

# How long the agent keeps the answer back while nothing changes. In between what nobody drives is
# looked for, by one statement: with settling.SURE_SECONDS, it is settled within ten seconds.
LONG_POLL_SECONDS = 7.5


class Listener:
    """What was heard so far: up to which number, of which run of the agent."""

    def __init__(self) -> None:
        self._run = ""
        self._seq = 0

    def poll(self) -> None:
        """Wait for a change, or for a while, and bring the rows up to date.

        Raises the host's errors and the database's: then the same is heard again.
        """
        changes = host().changes(self._run, self._seq, seconds=LONG_POLL_SECONDS)
        if not changes.whole:
            if installation.agree(standing.has_known_objects):
                settling.settle_all()
        elif changes.sandboxes and not installation.is_apart():
            lifecycle.apply_changes(changes.sandboxes)
        settling.settle_orphans()
        self._run, self._seq = changes.run, changes.seq
