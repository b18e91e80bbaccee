"""Whether the database that gives the orders and the state directory belong together.

What reconciliation deletes is what no row names, and so it must know that the rows are those of
this state: not of an empty database, not of another installation's, not of a backup.  Both carry
the installation's id and a *mark*, a random word that changes every minute: the database writes a
new one down, and then tells it here, together with the one it replaces.  So (all in
``installation.json``, flushed to disk)

- the mark here is the database's, or the one it replaces (it, or we, died between the two): they
  have been together without a break, and what the rows say holds;
- it is neither: one of them has gone on without the other, as it does when one comes from a
  backup.  Or the id is another's.  Nothing is deleted then, until an operator says that they
  belong together (:meth:`InstallationBook.adopt`).

``epoch`` counts the marks, for people.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict, TypeAdapter

from hostruntime.errors import Conflict
from hostruntime.host.paths import StatePaths, write_json
from hostruntime.host.records import STRICT, BadRecord, read_record
from hostruntime.wire.keeping import Claim, StandingInfo

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Standing:
    """What the state directory says of itself; no id as long as no database has claimed it.

    ``mismatch`` is why nothing is deleted, empty while all is well; ``since`` when that was found
    (Unix seconds).
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    id: str = ""
    epoch: int = 0
    mark: str = ""
    mismatch: str = ""
    since: float | None = None

    def info(self) -> StandingInfo:
        """What the agent's API answers: all but the mark."""
        return StandingInfo(self.id, self.epoch, self.mismatch, self.since)


class InstallationMismatch(Conflict):
    """The database and the state directory do not belong together: nothing is deleted."""

    code = "installation_mismatch"


class StateUnclaimed(Conflict):
    """The state holds tenants' work and no database has claimed it yet."""

    code = "state_unclaimed"


_STANDING = TypeAdapter(Standing)
_EMPTY = (
    "The state directory is new or empty, and the database has had another: its disk may not be "
    "mounted."
)
_DAMAGED = "The state directory's own record of which installation it belongs to is damaged."
_FOREIGN = (
    "The state directory belongs to another installation (or to an earlier database of this one: "
    "an empty database was put beside it)."
)
_UNCLAIMED = (
    "The state directory holds images or snapshots of which the database knows none: it is "
    "another's, or the database is new."
)


class InstallationBook:
    """The state directory's record of whose it is.  Methods may be called from any thread."""

    def __init__(self, paths: StatePaths) -> None:
        self._path = paths.installation_file
        self._lock = threading.Lock()

    def read(self) -> Standing:
        """What it says.  Raises OSError."""
        return standing_in(self._path)

    def agree(self, claim: Claim, *, empty: bool, known: bool) -> Standing:
        """Take down the database's new mark, if the two have been together until now.

        ``empty`` says that the state holds nothing of any tenant's, ``known`` that the database
        knows some of what it holds.  A state that nobody has claimed is the database's if it knows
        it, or if both are new.  Raises InstallationMismatch, StateUnclaimed, OSError.
        """
        with self._lock:
            found = self.read()
            why = _difference(found, claim)
            both_new = empty and not claim.previous
            if not why and not found.id and not (both_new or known):
                raise StateUnclaimed(_EMPTY if empty else _UNCLAIMED)
            if why:
                self._say(found, why)
                raise InstallationMismatch(why)
            return self._write(Standing(claim.id, claim.epoch, claim.mark))

    def refuse(self, *, empty: bool) -> None:
        """The state is not the database's, which knows nothing of what it holds, or it is empty.

        Raises InstallationMismatch, OSError.
        """
        why = _EMPTY if empty else _UNCLAIMED
        with self._lock:
            found = self.read()
            if not found.id:
                self._say(found, why)
        raise InstallationMismatch(found.mismatch if found.id else why)

    def require(self, claim: Claim) -> None:
        """Raise InstallationMismatch unless this very mark was agreed on last."""
        with self._lock:
            found = self.read()
        if found.mismatch or (found.id, found.mark) != (claim.id, claim.mark):
            raise InstallationMismatch(found.mismatch or "The database has another mark by now.")

    def adopt(self, claim: Claim) -> Standing:
        """An operator's word: they belong together from now on.  Raises OSError."""
        with self._lock:
            _log.warning("the state directory is taken to be of installation %s", claim.id)
            return self._write(Standing(claim.id, claim.epoch, claim.mark))

    def _say(self, found: Standing, why: str) -> None:
        if found.mismatch != why:
            _log.error("nothing is deleted by reconciliation: %s", why)
            self._write(replace(found, mismatch=why, since=found.since or time.time()))

    def _write(self, standing: Standing) -> Standing:
        write_json(self._path, asdict(standing), durable=True)
        return standing


def standing_in(path: Path) -> Standing:
    """What the record of a state directory says; also for who only looks.  Raises OSError."""
    try:
        return read_record(path, _STANDING) or Standing()
    except BadRecord:
        return Standing(mismatch=_DAMAGED)


def _difference(found: Standing, claim: Claim) -> str:
    """Why the two do not belong together; empty if they do, or if nobody has claimed the state."""
    if found.mismatch == _DAMAGED:
        return _DAMAGED
    if not found.id:
        return ""
    if found.id != claim.id:
        return _FOREIGN
    if found.mark in (claim.mark, claim.previous):
        return ""
    apart = found.epoch - claim.epoch
    if apart > 0:
        return (
            f"The database is older than the state directory, by about {apart} minutes of work: "
            "it was restored from a backup, and knows nothing of what was made since."
        )
    if apart < -1:
        return (
            f"The state directory is older than the database, by about {-apart} minutes of work: "
            "it was restored from a backup, and lacks what was made since."
        )
    return (
        "The database and the state directory have each gone on without the other: one of them "
        "was restored from a backup."
    )
