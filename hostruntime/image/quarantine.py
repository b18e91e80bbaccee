"""Quarantine: files taken out of use immediately, but kept for days instead of being deleted.

Each item is moved here by one rename on the same file system::

    quarantine/<kind>.<name>/why.json    what it was, when and why it was quarantined
    quarantine/<kind>.<name>/content     the directory or file itself

An item is *unknown* if it is an image or a snapshot that no row of the console's database names.
The database may be an older one, or a different one, so this may be the only copy of someone's
work. It is *damaged* if its record is invalid (:mod:`hostruntime.host.records`).

Both can be restored (rename :meth:`Quarantine.content_path`) until :meth:`Quarantine.purge` deletes
them permanently.
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
_RECORD, _CONTENT = "why.json", "content"
_KEY = re.compile(r"[a-z]+\.[A-Za-z0-9][A-Za-z0-9._@~-]{0,199}", re.ASCII)
_log = logging.getLogger(__name__)

Kind = Literal["image", "snapshot", "sandbox", "build", "usage"]
Reason = Literal["unknown", "damaged"]


@dataclass(frozen=True)
class QuarantinedItem(QuarantinedItemInfo):
    """An item in quarantine, with its kind and reason validated."""

    kind: Kind
    reason: Reason


_ITEM = TypeAdapter(QuarantinedItem)
Items = list[QuarantinedItem]
Entries = list[Path]


def retention_days(environment: Mapping[str, str] = os.environ) -> float:
    """Return how many days items are kept: ``ORKESTR_QUARANTINE_DAYS``, by default 7.

    Raises InvalidRequest if the variable is not a valid number of days.
    """
    setting = environment.get("ORKESTR_QUARANTINE_DAYS", "").strip()
    try:
        days = float(setting) if setting else DEFAULT_DAYS
        if not 1 <= days <= 36_500:
            raise ValueError
    except ValueError:
        raise InvalidRequest(
            f"ORKESTR_QUARANTINE_DAYS takes a number of days, 1 or more, not {setting[:50]!r}."
        ) from None
    return days


class Quarantine:
    """The quarantine of one installation.  Methods may be called from any thread."""

    def __init__(self, paths: StatePaths, trash: Trash) -> None:
        self._root = paths.quarantine
        self._trash = trash

    def add(
        self, path: Path, kind: Kind, reason: Reason, detail: str, size_bytes: int | None = None
    ) -> QuarantinedItem:
        """Move ``path`` into quarantine.

        Raises OSError (EBUSY if something is mounted inside, FileNotFoundError if it is missing).
        """
        key = f"{kind}.{path.name}"
        if _KEY.fullmatch(key) is None:
            key = f"{kind}.odd~{time.time_ns()}"
        elif os.path.lexists(self._root / key):
            key = f"{key}~{time.time_ns()}"
        item = QuarantinedItem(key, kind, path.name, reason, detail, time.time(), size_bytes)
        entry = self._root / key
        try:
            entry.mkdir(mode=0o700)
            write_json(entry / _RECORD, asdict(item), durable=True)
            path.rename(entry / _CONTENT)
        except OSError:
            self._trash.discard(entry)
            raise
        kernel.fsync(path.parent)
        kernel.fsync(self._root)
        _log.error("%s %s was quarantined: %s", kind, path.name, detail)
        return item

    def add_damaged(self, path: Path, kind: Kind, detail: str) -> None:
        """:meth:`add` something damaged; if that fails (a full disk), leave it in place, unused.

        A failure is only logged, so that the rest can still be served.
        """
        try:
            self.add(path, kind, "damaged", detail)
        except OSError as error:
            _log.error("%s could not be quarantined, and is ignored: %s (%s)", path, detail, error)

    def list(self) -> Items:
        """Return all items, the oldest first."""
        found = [item for entry in self._entries() if (item := _read_entry(entry)) is not None]
        return sorted(found, key=lambda item: item.at)

    def get(self, key: str) -> QuarantinedItem:
        """Return one item.  Raises NotFound, InvalidRequest."""
        entry = self._entry(key)
        item = _read_entry(entry) if entry.is_dir() else None
        if item is None:
            raise NotFound(f"There is nothing called {key[:100]!r} in quarantine.")
        return item

    def content_path(self, item: QuarantinedItem) -> Path:
        """Return where the item is now; rename it from there to take it out of quarantine."""
        return self._root / item.key / _CONTENT

    def remove_entry(self, item: QuarantinedItem) -> None:
        """Remove the entry of an item whose content was taken out."""
        self._trash.discard(self._root / item.key)

    def delete(self, key: str) -> None:
        """Delete an item permanently; idempotent.  Raises InvalidRequest, OSError."""
        entry = self._entry(key)
        if entry.is_dir():
            _log.warning("%s is deleted from quarantine", key)
        self._trash.discard(entry)

    def purge(self, days: float) -> Items:
        """Delete items older than ``days``; return them."""
        oldest = time.time() - days * _DAY
        old = [item for item in self.list() if item.at < oldest]
        for item in old:
            self.delete(item.key)
        return old

    def recover(self) -> None:
        """Drop entries that a killed agent left without content; called at start."""
        for entry in self._entries():
            if not os.path.lexists(entry / _CONTENT):
                self._trash.discard(entry)

    def _entries(self) -> Entries:
        return [entry for entry in self._root.iterdir() if _KEY.fullmatch(entry.name)]

    def _entry(self, key: str) -> Path:
        if _KEY.fullmatch(key) is None:
            raise InvalidRequest(f"{key[:100]!r} is not the name of anything in quarantine.")
        return self._root / key


def _read_entry(entry: Path) -> QuarantinedItem | None:
    """Read an entry's record; if that is damaged, build the item from the entry's name."""
    if not os.path.lexists(entry / _CONTENT):
        return None
    try:
        item = read_record(entry / _RECORD, _ITEM)
    except BadRecord:
        item = None
    if item is not None and item.key == entry.name:
        return item
    kind, _, name = entry.name.partition(".")
    seen: dict[str, Any] = {"key": entry.name, "kind": kind, "name": name, "reason": "damaged"}
    try:
        return _ITEM.validate_python(
            {**seen, "detail": "its own record is missing", "at": entry.stat().st_mtime}
        )
    except (ValueError, OSError):
        return None
