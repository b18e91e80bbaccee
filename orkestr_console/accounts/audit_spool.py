"""Audit entries that are written behind their answers, from a file that keeps them until then.

Whoever waits for a command need not wait for the database as well. Its entry is appended to a file
of the web process, which takes microseconds, and a thread writes what has gathered there with one
statement. The file survives the end of any process: what one that was killed has left is written by
the next that starts. Whether somebody still uses a file, its lock tells (flock(2)), which the
kernel releases with the process.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path

from django.db import DatabaseError, InterfaceError

from orkestr_console.accounts.models import AuditEntry
from orkestr_console.core.postgres import release_connection, unavailable

logger = logging.getLogger(__name__)

# While the database is away; whoever comes after that many waits for it.
MAX_PENDING = 2000
# What comes within this time is written together.
GATHER_SECONDS = 0.2
RETRY_SECONDS = 0.5
# How long a process that ends waits for the database; the next one writes the rest.
CLOSE_SECONDS = 2.0
SUFFIX = ".spool"
# How much of a line that can't be read is logged.
MAX_SHOWN = 1000


@dataclass
class Batch:
    """Entries that are written together, and their file."""

    path: Path
    descriptor: int
    entries: list[AuditEntry] = field(default_factory=list)

    @classmethod
    def create(cls, path: Path) -> Batch:
        """An empty one, which has its name once it is locked. Raises ``OSError``."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
        unlocked = path.with_suffix(".new")
        batch = cls(path, os.open(unlocked, flags, 0o600))
        fcntl.flock(batch.descriptor, fcntl.LOCK_EX)
        unlocked.rename(path)
        return batch

    def add(self, entry: AuditEntry) -> None:
        """Append an entry. Raises ``OSError`` if it could not be, or not whole."""
        line = encode(entry)
        written = os.write(self.descriptor, line)
        if written < len(line):
            # The next must not begin on the same line.
            os.ftruncate(self.descriptor, os.fstat(self.descriptor).st_size - written)
            raise OSError(f"only {written} of {len(line)} bytes could be written")
        self.entries.append(entry)

    def remove(self) -> None:
        """Delete the file: all of it is in the database."""
        self.path.unlink(missing_ok=True)
        os.close(self.descriptor)


class AuditSpool:
    """The entries of one process that are not in the database yet."""

    def __init__(self, directory: Path) -> None:
        """Raises ``OSError`` where nothing can be kept."""
        self._directory = directory
        self._changed = threading.Condition()
        self._closing = False
        self._current = self._next_batch()
        self._writer = threading.Thread(target=self._write_all, name="audit", daemon=True)

    def start(self) -> None:
        """Begin to write: first what other processes have left."""
        self._writer.start()

    def keep(self, entry: AuditEntry) -> bool:
        """Keep an entry until it is written; False if the caller has to write it."""
        with self._changed:
            if self._closing or len(self._current.entries) >= MAX_PENDING:
                return False
            try:
                self._current.add(entry)
            except OSError as error:
                logger.warning("an audit entry is written at once: %s", error)
                return False
            self._changed.notify()
        return True

    def close(self) -> None:
        """Write what there is, if that takes no longer than it should."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._writer.join(CLOSE_SECONDS)

    def _next_batch(self) -> Batch:
        # Nobody else's name, and after those before it.
        return Batch.create(self._directory / f"{time.time_ns()}-{os.getpid()}{SUFFIX}")

    def _write_all(self) -> None:
        self._persist(partial(recover, self._directory))
        while batch := self._take():
            self._persist(partial(write, batch.entries))
            batch.remove()

    def _take(self) -> Batch | None:
        """The next entries, once there are any; None when there will be no more."""
        with self._changed:
            while not self._current.entries and not self._closing:
                self._changed.wait()
            if not self._current.entries:
                self._current.remove()
                return None
        if not self._closing:
            time.sleep(GATHER_SECONDS)
        while True:
            try:
                with self._changed:
                    batch, self._current = self._current, self._next_batch()
            except OSError as error:
                logger.warning("audit entries wait for space: %s", error)
                time.sleep(RETRY_SECONDS)
            else:
                return batch

    def _persist(self, operation: Callable[[], None]) -> None:
        """Do it, however long the database is away."""
        while True:
            try:
                operation()
            except (DatabaseError, InterfaceError, OSError) as error:
                logger.warning("audit entries are not written yet: %s", error)
                time.sleep(RETRY_SECONDS)
            else:
                return
            finally:
                release_connection()


def recover(directory: Path) -> None:
    """Write what processes that have ended left, none of it twice."""
    for path in sorted(directory.glob(f"*{SUFFIX}")):
        try:
            recover_file(path)
        except OSError as error:
            # The next start tries it again; meanwhile nobody else's entries wait for it.
            logger.error("audit entries cannot be read from %s: %s", path, error)


def recover_file(path: Path) -> None:
    """Write what is in a file that nobody uses any more. Raises ``OSError``."""
    with contextlib.suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A line without an end was never kept: its process was killed as it wrote it.
        lines = file.read().split(b"\n")[:-1]
        entries = [entry for line in lines if (entry := read_back(line)) is not None]
        write([entry for entry in entries if not is_written(entry)])
        path.unlink(missing_ok=True)


def write(entries: list[AuditEntry]) -> None:
    """Insert entries. Raises if the database is away; one that it refuses is logged instead."""
    try:
        AuditEntry.objects.bulk_create(entries)
    except DatabaseError as error:
        if unavailable(error) is not None:
            raise
        for entry in entries:
            write_alone(entry)


def write_alone(entry: AuditEntry) -> None:
    """Insert an entry that may be the one that the database refuses, or be written already."""
    try:
        if not is_written(entry):
            AuditEntry.objects.bulk_create([entry])
    except DatabaseError as error:
        if unavailable(error) is not None:
            raise
        logger.exception("the database refuses an audit entry: %s", encode(entry).decode())


def is_written(entry: AuditEntry) -> bool:
    """Whether the database has it: it was killed after that, and before it deleted its file."""
    same = {"at": entry.at, "action": entry.action, "object_id": entry.object_id}
    return AuditEntry.objects.filter(team_id=entry.team_id, who=entry.who, **same).exists()


def encode(entry: AuditEntry) -> bytes:
    """An entry as a line of JSON."""
    fields = [each.attname for each in AuditEntry._meta.concrete_fields if not each.primary_key]
    values = {name: getattr(entry, name) for name in fields}
    # The time, to the microsecond: together with what was done to what, it tells entries apart.
    return json.dumps(values, default=str).encode() + b"\n"


def decode(line: bytes) -> AuditEntry:
    """The entry of a line of :func:`encode`."""
    values = json.loads(line)
    return AuditEntry(**values | {"at": datetime.fromisoformat(values["at"])})


def read_back(line: bytes) -> AuditEntry | None:
    """The entry of a line of a file; one that isn't whole is logged, and holds up no other.

    Nothing waits for the disk, so that a machine that lost power can leave zeros instead.
    """
    try:
        return decode(line)
    except (ValueError, TypeError, KeyError):
        logger.exception("an audit entry that was left can't be read: %s", line[:MAX_SHOWN])
        return None


_spool: AuditSpool | None = None


def start(directory: Path) -> None:
    """Let this process keep entries in ``directory``; it writes each at once if it cannot."""
    global _spool
    try:
        spool = AuditSpool(directory)
    except OSError as error:
        logger.info("audit entries are written before the answer: %s", error)
        return
    spool.start()
    _spool = spool


def stop() -> None:
    """Write what there is; later entries are written at once."""
    global _spool
    spool, _spool = _spool, None
    if spool is not None:
        spool.close()


def keep(entry: AuditEntry) -> bool:
    """Keep an entry until it is written; False if the caller has to write it."""
    spool = _spool
    return spool is not None and spool.keep(entry)
