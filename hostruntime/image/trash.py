"""Delete trees: rename them out of the way immediately, then unlink them in the background.

A tenant may have made a tree arbitrarily deep, so nothing here recurses: each nested directory is
first renamed up into the trash itself, at the same cost however large it is, and removed from
there. Symlinks are unlinked, never followed.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from pathlib import Path

from hostruntime.host.paths import StatePaths
from hostruntime.host.tasks import log_errors
from hostruntime.image.trees import is_directory, list_entries, open_directory

_log = logging.getLogger(__name__)


class Trash:
    """The trash directory of an installation and the one thread that empties it."""

    def __init__(self, paths: StatePaths) -> None:
        self._directory = paths.trash
        self._counter = itertools.count()
        self._wake = threading.Condition()
        self._busy = False
        self._requested = False
        self._thread: threading.Thread | None = None

    def discard(self, path: Path) -> None:
        """Move ``path`` (a tree on the same file system) away and unlink it in the background.

        The path no longer exists when this returns; idempotent.  Raises OSError (EBUSY if
        something is still mounted inside).
        """
        try:
            path.rename(self._directory / self._unique_name())
        except FileNotFoundError:
            return
        self.empty()

    def empty(self) -> None:
        """Unlink everything in the trash, in the background."""
        with self._wake:
            self._requested = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="trash", daemon=True)
                self._thread.start()
            self._wake.notify_all()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the trash is empty; False after ``timeout`` seconds."""
        with self._wake:
            return self._wake.wait_for(lambda: not (self._requested or self._busy), timeout)

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._requested)
                self._requested, self._busy = False, True
            with log_errors("the trash could not be emptied; it will be tried again"):
                self._empty_now()
            with self._wake:
                self._busy = False
                self._wake.notify_all()

    def _empty_now(self) -> None:
        with open_directory(self._directory) as top:
            children = list_entries(top)
            while children:
                removed = [self._remove(entry, top) for entry in children]
                if not any(removed):
                    return  # Nothing else can be removed; each failure has been logged.
                children = list_entries(top)

    def _remove(self, entry: os.DirEntry[str], top: int) -> bool:
        try:
            if is_directory(entry):
                self._flatten(entry.name, top)
                os.rmdir(entry.name, dir_fd=top)
            else:
                os.unlink(entry.name, dir_fd=top)
        except OSError as error:
            _log.warning("%s cannot be removed from the trash: %s", entry.name, error)
            return False
        return True

    def _flatten(self, name: str, top: int) -> None:
        with open_directory(name, top) as directory:
            for entry in list_entries(directory):
                if is_directory(entry):
                    target = self._unique_name()
                    os.rename(entry.name, target, src_dir_fd=directory, dst_dir_fd=top)
                else:
                    os.unlink(entry.name, dir_fd=directory)

    def _unique_name(self) -> str:
        return f"{time.time_ns()}-{os.getpid()}-{next(self._counter)}"
