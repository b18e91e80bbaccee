"""Whether the database and the state directory belong to the same installation.

Reconciliation deletes what no row names, so it must know that the rows describe this state
directory: they must not come from an empty database, another installation or a backup.  Both carry
the installation's id and a *mark*, a random word that changes every minute: the database stores a
new one, and then sends it here, together with the one it replaces.  So (all in
``installation.json``, flushed to disk)

- if the mark here is the database's, or the one it replaces (one side died between the two
  writes), they have stayed in step and the rows can be trusted;
- otherwise one of them has moved on without the other, as happens when one is restored from a
  backup, or the id belongs to another installation.  Nothing is deleted then, until an operator
  confirms that they belong together (:meth:`InstallationStore.adopt`).

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
from hostruntime.wire.reconciliation import Claim, InstallationInfo

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InstallationRecord:
    """What the state directory records about itself; ``id`` is empty until a database claims it.

    ``mismatch`` is why nothing is deleted, empty if there is no mismatch; ``since`` is when it was
    found (Unix seconds).
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    id: str = ""
    epoch: int = 0
    mark: str = ""
    mismatch: str = ""
    since: float | None = None

    def info(self) -> InstallationInfo:
        """The record as the agent's API returns it: everything but the mark."""
        return InstallationInfo(self.id, self.epoch, self.mismatch, self.since)


class InstallationMismatch(Conflict):
    """The database and the state directory do not belong together; nothing is deleted."""

    code = "installation_mismatch"


class StateUnclaimed(Conflict):
    """The state holds tenants' work and no database has claimed it yet."""

    code = "state_unclaimed"


_RECORD_ADAPTER = TypeAdapter(InstallationRecord)
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


class InstallationStore:
    """The record of which installation owns the state directory.  Thread-safe."""

    def __init__(self, paths: StatePaths) -> None:
        self._path = paths.installation_file
        self._lock = threading.Lock()

    def read(self) -> InstallationRecord:
        """The current record.  Raises OSError."""
        return read_installation_record(self._path)

    def agree(self, claim: Claim, *, empty: bool, known: bool) -> InstallationRecord:
        """Record the database's new mark, if the two have stayed in step until now.

        ``empty`` means that the state directory holds no tenant's data, ``known`` that the database
        knows some of what it holds.  An unclaimed state directory is assigned to the database if
        the database knows its contents, or if both are new.  Raises InstallationMismatch,
        StateUnclaimed, OSError.
        """
        with self._lock:
            record = self.read()
            reason = _mismatch_reason(record, claim)
            both_are_new = empty and not claim.previous
            if not reason and not record.id and not (both_are_new or known):
                raise StateUnclaimed(_EMPTY if empty else _UNCLAIMED)
            if reason:
                self._record_mismatch(record, reason)
                raise InstallationMismatch(reason)
            return self._write(InstallationRecord(claim.id, claim.epoch, claim.mark))

    def refuse(self, *, empty: bool) -> None:
        """Refuse a database that knows nothing of the state directory, or find it ``empty``.

        Raises InstallationMismatch, OSError.
        """
        reason = _EMPTY if empty else _UNCLAIMED
        with self._lock:
            record = self.read()
            if not record.id:
                self._record_mismatch(record, reason)
        raise InstallationMismatch(record.mismatch if record.id else reason)

    def require(self, claim: Claim) -> None:
        """Raise InstallationMismatch unless exactly this mark was agreed on last."""
        with self._lock:
            record = self.read()
        if record.mismatch or (record.id, record.mark) != (claim.id, claim.mark):
            raise InstallationMismatch(record.mismatch or "The database has another mark by now.")

    def adopt(self, claim: Claim) -> InstallationRecord:
        """Assign the state directory to the database, as an operator decided.  Raises OSError."""
        with self._lock:
            _log.warning("an operator assigned the state directory to installation %s", claim.id)
            return self._write(InstallationRecord(claim.id, claim.epoch, claim.mark))

    def _record_mismatch(self, record: InstallationRecord, reason: str) -> None:
        if record.mismatch != reason:
            _log.error("reconciliation deletes nothing: %s", reason)
            self._write(replace(record, mismatch=reason, since=record.since or time.time()))

    def _write(self, record: InstallationRecord) -> InstallationRecord:
        write_json(self._path, asdict(record), durable=True)
        return record


def read_installation_record(path: Path) -> InstallationRecord:
    """Read the record of a state directory without an InstallationStore.  Raises OSError."""
    try:
        return read_record(path, _RECORD_ADAPTER) or InstallationRecord()
    except BadRecord:
        return InstallationRecord(mismatch=_DAMAGED)


def _mismatch_reason(record: InstallationRecord, claim: Claim) -> str:
    """Why the two do not belong together; empty if they do, or if the state is unclaimed."""
    if record.mismatch == _DAMAGED:
        return _DAMAGED
    if not record.id:
        return ""
    if record.id != claim.id:
        return _FOREIGN
    if record.mark in (claim.mark, claim.previous):
        return ""
    ahead = record.epoch - claim.epoch
    if ahead > 0:
        return (
            f"The database is older than the state directory, by about {ahead} minutes of work: "
            "it was restored from a backup, and lacks what was created since."
        )
    if ahead < -1:
        return (
            f"The state directory is older than the database, by about {-ahead} minutes of work: "
            "it was restored from a backup, and lacks what was created since."
        )
    return (
        "The database and the state directory have each gone on without the other: one of them "
        "was restored from a backup."
    )
