"""Copies of whole trees on another file system, in which what was one file is one file again.

Images share files by hard links, within a tree and from one to the next.  A :class:`Replicas`
copies tree after tree and remembers where it put each file that has several names, so that the next
name becomes a link; of trees that were copied before, by another process, it learns the same by
walking the originals.  Both sides are immutable and closed to everybody but root.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection
from pathlib import Path

from hostruntime.host.progress import Progress
from hostruntime.image.content_hash import ContentHashCache
from hostruntime.image.copying import Copier, copy_metadata
from hostruntime.image.trees import (
    MAX_DEPTH,
    Check,
    TreeTooDeep,
    is_directory,
    list_entries,
    lstat,
    open_directory,
)

# Too many links to the file (ext4 has 65,000), or too deep a path: it is copied instead.
_COPY_INSTEAD = frozenset({errno.EMLINK, errno.ENAMETOOLONG})


class Replicas:
    """Copies trees of one file system to another.  ``check`` may end it; for one thread."""

    def __init__(self, check: Check, progress: Progress) -> None:
        self._check = check
        self._copier = Copier(check, ContentHashCache(), progress)
        # Where the copies are, and in which of them each file of several names is, at what path.
        self._places: list[bytes] = []
        self._links: dict[int, tuple[int, bytes]] = {}

    def learn(self, source: Path, target: Path) -> None:
        """Take note of ``target``, the copy of ``source`` that there is already.  Raises OSError"""
        self._places.append(os.fsencode(target))
        with open_directory(source) as origin:
            self._learn(origin, b"", 0)

    def copy(self, source: Path, target: Path, only: Collection[str] | None = None) -> None:
        """Copy a directory to the new one ``target``; with ``only``, no other names in it.

        Raises TreeTooDeep, OSError, and what the check does; then :meth:`forget` it.
        """
        target.mkdir(mode=0o700)
        self._places.append(os.fsencode(target))
        with open_directory(source) as origin, open_directory(target) as copy:
            self._visit(origin, copy, b"", 0, only)

    def forget(self) -> None:
        """What was copied last is to go: link to nothing of it."""
        last = len(self._places) - 1
        self._links = {inode: at for inode, at in self._links.items() if at[0] != last}

    def moved(self, target: Path) -> None:
        """What was copied last has been renamed to ``target``."""
        self._places[-1] = os.fsencode(target)

    def _learn(self, source: int, path: bytes, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise TreeTooDeep
        self._check()
        for entry in list_entries(source):
            there = path + b"/" + os.fsencode(entry.name)
            if is_directory(entry):
                with open_directory(entry.name, source) as inner:
                    self._learn(inner, there, depth + 1)
            elif lstat(entry.name, source).st_nlink > 1:
                self._links.setdefault(entry.inode(), (len(self._places) - 1, there))

    def _visit(
        self, source: int, target: int, path: bytes, depth: int, only: Collection[str] | None = None
    ) -> None:
        if depth > MAX_DEPTH:
            raise TreeTooDeep
        for entry in list_entries(source):
            if only is not None and entry.name not in only:
                continue
            self._check()
            there = path + b"/" + os.fsencode(entry.name)
            if is_directory(entry):
                os.mkdir(entry.name, mode=0o700, dir_fd=target)
                with (
                    open_directory(entry.name, source) as inner,
                    open_directory(entry.name, target) as copy,
                ):
                    self._visit(inner, copy, there, depth + 1)
            else:
                self._file(entry.name, source, target, there)
        copy_metadata(source, target)

    def _file(self, name: str, source: int, target: int, path: bytes) -> None:
        found = lstat(name, source)
        several = found.st_nlink > 1
        at = self._links.get(found.st_ino) if several else None
        if at is not None and _linked(self._places[at[0]] + at[1], name, target):
            return
        if stat.S_ISSOCK(found.st_mode) or stat.S_ISCHR(found.st_mode):
            _make_node(name, target, found)
        else:
            self._copier.copy(name, source, target)
        if several:
            self._links[found.st_ino] = len(self._places) - 1, path


def _linked(old: bytes, name: str, target: int) -> bool:
    """Whether ``name`` could be made another name of ``old``."""
    try:
        os.link(old, os.fsencode(name), dst_dir_fd=target, follow_symlinks=False)
    except OSError as error:
        # Gone: somebody has removed that copy by hand.
        if error.errno in _COPY_INSTEAD or error.errno == errno.ENOENT:
            return False
        raise
    return True


def _make_node(name: str, target: int, found: os.stat_result) -> None:
    """A socket, or a device as an image may hold one: names that no mount lets be opened."""
    os.mknod(name, found.st_mode, found.st_rdev, dir_fd=target)
    os.chown(name, found.st_uid, found.st_gid, dir_fd=target, follow_symlinks=False)
    times = (found.st_atime_ns, found.st_mtime_ns)
    os.utime(name, ns=times, dir_fd=target, follow_symlinks=False)
