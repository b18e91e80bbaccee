"""Getting rid of trees: at once out of the way by a rename, then unlinked in the background.

A tree may be as deep and as odd as a tenant could make it.  So nothing here recurses: each
directory found inside another is first renamed up into the trash itself, which costs the same
however large it is, and is dealt with there.  Symlinks are unlinked, never followed.
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
from hostruntime.image.trees import entries, is_directory, opened

_log = logging.getLogger(__name__)


class Trash:
    """The trash directory of an installation and the one thread that empties it."""

    def __init__(self, paths: StatePaths) -> None:
        self._directory = paths.trash
        self._counter = itertools.count()
        self._wake = threading.Condition()
        self._busy = False
        self._asked = False
        self._thread: threading.Thread | None = None

    def discard(self, path: Path) -> None:
        """Move ``path`` (a tree on the same filesystem) away and unlink it in the background.

        Nothing of that name is left when this returns; a missing path is fine.  Raises OSError
        (EBUSY when something is still mounted inside).
        """
        try:
            path.rename(self._directory / self._fresh_name())
        except FileNotFoundError:
            return
        self.empty()

    def empty(self) -> None:
        """Unlink whatever is in the trash, in the background."""
        with self._wake:
            self._asked = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="trash", daemon=True)
                self._thread.start()
            self._wake.notify_all()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the trash has been emptied (seconds); False if it still has not been."""
        with self._wake:
            return self._wake.wait_for(lambda: not (self._asked or self._busy), timeout)

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._asked)
                self._asked, self._busy = False, True
            with log_errors("the trash could not be emptied; it will be tried again"):
                self._empty_now()
            with self._wake:
                self._busy = False
                self._wake.notify_all()

    def _empty_now(self) -> None:
        with opened(self._directory) as top:
            found = entries(top)
            while found:
                removed = [self._remove(entry, top) for entry in found]
                if not any(removed):
                    return  # All that is left refuses to go; each refusal has been logged.
                found = entries(top)

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
        with opened(name, top) as directory:
            for entry in entries(directory):
                if is_directory(entry):
                    target = self._fresh_name()
                    os.rename(entry.name, target, src_dir_fd=directory, dst_dir_fd=top)
                else:
                    os.unlink(entry.name, dir_fd=directory)

    def _fresh_name(self) -> str:
        return f"{time.time_ns()}-{os.getpid()}-{next(self._counter)}"
