"""Polling the host for changed sandboxes, and settling rows that nobody drives any more.

One process of an installation does this (:mod:`orkestr_console.queue.worker`). It long-polls the
agent for sandboxes that changed since the last poll. Nothing is lost: a poll counts only once its
changes are in the rows, and where something may have been missed (the first time, after a restart
of the agent) all rows are compared with all containers.
"""

from __future__ import annotations

from orkestr_console.core.hosts import host
from orkestr_console.installation import services as installation
from sandboxes_app.services import lifecycle, settling, standing

# How long the agent delays its answer while nothing changes. Between polls, one statement finds
# what nobody drives: with settling.SURE_SECONDS, that is settled within ten seconds.
LONG_POLL_SECONDS = 7.5


class Listener:
    """The position in the host's changes: a number, and the agent's run that it belongs to."""

    def __init__(self) -> None:
        self._run = ""
        self._seq = 0

    def poll(self) -> None:
        """Wait for a change or for ``LONG_POLL_SECONDS``, and bring the rows up to date.

        Raises the host's and the database's errors: the next poll then repeats the changes.
        """
        changes = host().changes(self._run, self._seq, seconds=LONG_POLL_SECONDS)
        if not changes.whole:
            if installation.agree(standing.has_known_objects):
                settling.settle_all()
        elif changes.sandboxes and not installation.is_mismatched():
            lifecycle.apply_changes(changes.sandboxes)
        settling.settle_orphans()
        self._run, self._seq = changes.run, changes.seq
