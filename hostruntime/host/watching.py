"""Waiting for files to change, without a thread and without looking again and again (inotify(7)).

A :class:`FileWatch` has one inotify instance for everybody who waits on its event loop: a machine
allows a user only so many of those.  Events say that something happened, never what: whoever waits
looks for themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from hostruntime.host import kernel
from hostruntime.host.tasks import in_thread

# include/uapi/linux/inotify.h
_IN_MODIFY, _IN_ATTRIB, _IN_CLOSE_WRITE = 0x2, 0x4, 0x8
_IN_DELETE_SELF, _IN_MOVE_SELF = 0x400, 0x800
_EVENTS = _IN_MODIFY | _IN_ATTRIB | _IN_CLOSE_WRITE | _IN_DELETE_SELF | _IN_MOVE_SELF
# After it a watch's number means nothing any more: its file is gone, or was unmounted.
_IN_IGNORED = 0x8000
_IN_Q_OVERFLOW = 0x4000
_EVENT = struct.Struct("iIII")
_READ_BYTES = 64 * 1024


class FileWatch:
    """Watches files for any number of waiters.  For use on one event loop."""

    def __init__(self) -> None:
        self._descriptor = -1
        self._waiting: dict[int, list[asyncio.Event]] = {}
        # How often a watch was ended.
        self._ended = 0

    @property
    def watched(self) -> int:
        """How many files are watched."""
        return len(self._waiting)

    @asynccontextmanager
    async def changes(self, paths: Sequence[Path]) -> AsyncIterator[asyncio.Event]:
        """An event that is set whenever one of the files changes, or is closed by a writer.

        Whoever waits clears it.  Raises OSError (also FileNotFoundError).
        """
        changed = asyncio.Event()
        if self._descriptor < 0:
            self._descriptor = kernel.inotify_init()
            asyncio.get_running_loop().add_reader(self._descriptor, self._read)
        watches: list[int] = []
        try:
            for path in paths:
                watch = await self._add(path)
                self._waiting.setdefault(watch, []).append(changed)
                watches.append(watch)
            # It may have changed before it was watched.
            changed.set()
            yield changed
        finally:
            for watch in watches:
                self._leave(watch, changed)

    async def _add(self, path: Path) -> int:
        while True:
            ended = self._ended
            watch = await in_thread(kernel.inotify_add_watch, self._descriptor, path, _EVENTS)
            # Otherwise it may be this one that was ended meanwhile: all of a file's are the same.
            if ended == self._ended:
                return watch

    def close(self) -> None:
        """Stop watching; nobody may be waiting any more."""
        if self._descriptor >= 0:
            asyncio.get_running_loop().remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1
            self._waiting.clear()

    def _leave(self, watch: int, changed: asyncio.Event) -> None:
        waiting = self._waiting.get(watch, [])
        if changed in waiting:
            waiting.remove(changed)
            if not waiting:
                del self._waiting[watch]
                self._end(watch)

    def _end(self, watch: int) -> None:
        self._ended += 1
        with contextlib.suppress(OSError):
            kernel.inotify_rm_watch(self._descriptor, watch)

    def _read(self) -> None:
        try:
            data = os.read(self._descriptor, _READ_BYTES)
        except BlockingIOError:
            return
        position = 0
        while position < len(data):
            watch, mask, _, length = _EVENT.unpack_from(data, position)
            position += _EVENT.size + length
            self._notify(watch, mask)

    def _notify(self, watch: int, mask: int) -> None:
        if mask & _IN_Q_OVERFLOW:
            # Events were lost, of anybody's.
            for waiting in self._waiting.values():
                for changed in waiting:
                    changed.set()
            return
        if mask & _IN_IGNORED:
            for changed in self._waiting.pop(watch, ()):
                changed.set()
        elif watch in self._waiting:
            for changed in self._waiting[watch]:
                changed.set()
        else:
            # Whoever asked for it was cancelled meanwhile, or asks again.
            self._end(watch)
