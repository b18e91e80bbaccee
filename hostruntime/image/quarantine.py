"""What is set aside instead of being deleted: out of use at once, and kept for days.

Two kinds of things come here, each by one rename on the same file system::

    quarantine/<kind>.<name>/why.json    what it was, when and why it was set aside
    quarantine/<kind>.<name>/content     the directory or file itself

What *nobody names*: an image or a snapshot that no row of the console's database knows.  The
database may be an older one, or another's, and then it would be the only copy of somebody's work.
What is *damaged*: something whose record cannot be believed (:mod:`hostruntime.host.records`).

Both can be put back (:meth:`Quarantine.take`, then a rename) until :meth:`Quarantine.purge` deletes
them for good.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from hostruntime.errors import InvalidRequest, NotFound
from hostruntime.host import kernel
from hostruntime.host.paths import StatePaths, write_json
from hostruntime.host.records import BadRecord, read_record
from hostruntime.image.trash import Trash
from hostruntime.wire.reconciliation import QuarantinedItemInfo

DEFAULT_DAYS = 7.0
_DAY = 86_400.0
_WHY, _CONTENT = "why.json", "content"
_KEY = re.compile(r"[a-z]+\.[A-Za-z0-9][A-Za-z0-9._@~-]{0,199}", re.ASCII)
_log = logging.getLogger(__name__)

Kind = Literal["image", "snapshot", "sandbox", "build", "usage"]
Reason = Literal["unknown", "damaged"]


@dataclass(frozen=True)
class Held(QuarantinedItemInfo):
    """One thing in quarantine, of a kind and for a reason that are known here."""

    kind: Kind
    reason: Reason


_HELD = TypeAdapter(Held)
Things = list[Held]
Entries = list[Path]


def keep_days(environment: Mapping[str, str] = os.environ) -> float:
    """For how many days things stay: ``ORKESTR_QUARANTINE_DAYS``, or a week.

    Raises InvalidRequest for what is no number of days.
    """
    named = environment.get("ORKESTR_QUARANTINE_DAYS", "").strip()
    try:
        days = float(named) if named else DEFAULT_DAYS
        if not 1 <= days <= 36_500:
            raise ValueError
    except ValueError:
        raise InvalidRequest(
            f"ORKESTR_QUARANTINE_DAYS takes a number of days, 1 or more, not {named[:50]!r}."
        ) from None
    return days


class Quarantine:
    """The quarantine of one installation.  Methods may be called from any thread."""

    def __init__(self, paths: StatePaths, trash: Trash) -> None:
        self._root = paths.quarantine
        self._trash = trash

    def add(
        self, path: Path, kind: Kind, reason: Reason, detail: str, size_bytes: int | None = None
    ) -> Held:
        """Move ``path`` here; nothing of that name is left when this returns.

        Raises OSError (EBUSY when something is mounted inside, FileNotFoundError when it is gone).
        """
        key = f"{kind}.{path.name}"
        if _KEY.fullmatch(key) is None:
            key = f"{kind}.odd~{time.time_ns()}"
        elif os.path.lexists(self._root / key):
            key = f"{key}~{time.time_ns()}"
        held = Held(key, kind, path.name, reason, detail, time.time(), size_bytes)
        entry = self._root / key
        try:
            entry.mkdir(mode=0o700)
            write_json(entry / _WHY, asdict(held), durable=True)
            path.rename(entry / _CONTENT)
        except OSError:
            self._trash.discard(entry)
            raise
        kernel.fsync(path.parent)
        kernel.fsync(self._root)
        _log.error("%s %s was set aside, not deleted: %s", kind, path.name, detail)
        return held

    def add_damaged(self, path: Path, kind: Kind, detail: str) -> None:
        """:meth:`add` what cannot be believed; where that fails (a full disk) it stays, unused.

        It must keep nobody from serving the rest.
        """
        try:
            self.add(path, kind, "damaged", detail)
        except OSError as error:
            _log.error("%s is left where it is, and not used: %s (%s)", path, detail, error)

    def list(self) -> Things:
        """Everything here, the oldest first."""
        found = [held for entry in self._entries() if (held := _held(entry)) is not None]
        return sorted(found, key=lambda held: held.at)

    def get(self, key: str) -> Held:
        """One thing; raises NotFound."""
        entry = self._entry(key)
        held = _held(entry) if entry.is_dir() else None
        if held is None:
            raise NotFound(f"There is nothing called {key[:100]!r} in quarantine.")
        return held

    def content(self, held: Held) -> Path:
        """Where it is now: what is renamed away from there has been taken out."""
        return self._root / held.key / _CONTENT

    def forget(self, held: Held) -> None:
        """Drop what is left of an entry whose content was taken out."""
        self._trash.discard(self._root / held.key)

    def delete(self, key: str) -> None:
        """Delete one thing for good; what is not here is fine.  Raises InvalidRequest, OSError."""
        entry = self._entry(key)
        if entry.is_dir():
            _log.warning("%s is deleted from quarantine", key)
        self._trash.discard(entry)

    def purge(self, days: float) -> Things:
        """Delete what has been here for longer; return it."""
        oldest = time.time() - days * _DAY
        old = [held for held in self.list() if held.at < oldest]
        for held in old:
            self.delete(held.key)
        return old

    def recover(self) -> None:
        """The pass at start: drop entries that a killed agent left without their content."""
        for entry in self._entries():
            if not os.path.lexists(entry / _CONTENT):
                self._trash.discard(entry)

    def _entries(self) -> Entries:
        return [entry for entry in self._root.iterdir() if _KEY.fullmatch(entry.name)]

    def _entry(self, key: str) -> Path:
        if _KEY.fullmatch(key) is None:
            raise InvalidRequest(f"{key[:100]!r} is not the name of anything in quarantine.")
        return self._root / key


def _held(entry: Path) -> Held | None:
    """What an entry says it is; of one whose own record is bad, what can be seen."""
    if not os.path.lexists(entry / _CONTENT):
        return None
    try:
        held = read_record(entry / _WHY, _HELD)
    except BadRecord:
        held = None
    if held is not None and held.key == entry.name:
        return held
    kind, _, name = entry.name.partition(".")
    seen: dict[str, Any] = {"key": entry.name, "kind": kind, "name": name, "reason": "damaged"}
    try:
        return _HELD.validate_python(
            {**seen, "detail": "its own record is gone", "at": entry.stat().st_mtime}
        )
    except (ValueError, OSError):
        return None
