"""A build's events: numbered from 1 without a gap, on disk before anybody is told of them.

One JSON object a line in ``events.ndjson``.  Followers read the file, never memory, so any
number of them, however slow, costs nothing, and a log reads the same after a restart.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

TERMINAL = frozenset({"published", "failed"})
KEEP_ALIVE_SECONDS = 10.0
_BATCH_BYTES = 1024 * 1024


class EventLog:
    """The events of one build.  Appended to, and followed, in one event loop."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offsets: list[int] = []
        self._size = 0
        self._followers: set[asyncio.Event] = set()
        self.terminal: dict[str, Any] | None = None
        self._load()

    @property
    def last_seq(self) -> int:
        """The number of the latest event, 0 without any."""
        return len(self._offsets)

    def append(self, kind: str, /, **fields: Any) -> None:
        """Write an event, then wake the followers; a terminal one is on the disk for good."""
        assert self.terminal is None, "a build ends once"
        event = {"seq": self.last_seq + 1, "at": time.time(), "kind": kind, **fields}
        line = json.dumps(event).encode() + b"\n"
        with self._path.open("ab") as file:
            file.write(line)
            file.flush()
            if kind in TERMINAL:
                os.fsync(file.fileno())
        self._note(event, len(line))
        for follower in self._followers:
            follower.set()

    async def follow(
        self, after: int = 0, *, follow: bool = True, keep_alive: float = KEEP_ALIVE_SECONDS
    ) -> AsyncIterator[bytes]:
        """The events numbered above ``after`` as lines, several at a time.

        With ``follow`` until the terminal one, with an empty line whenever ``keep_alive`` seconds
        have passed in silence; else those there are now.
        """
        position = max(0, after)
        changed = asyncio.Event()
        self._followers.add(changed)
        try:
            while True:
                changed.clear()
                while position < self.last_seq:
                    position, lines = self._read(position)
                    yield lines
                if self.terminal is not None or not follow:
                    return
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(keep_alive):
                        await changed.wait()
                if not changed.is_set():
                    yield b"\n"
        finally:
            self._followers.discard(changed)

    def _read(self, position: int) -> tuple[int, bytes]:
        begin, end = self._offsets[position], position + 1
        while end < self.last_seq and self._end(end) - begin <= _BATCH_BYTES:
            end += 1
        with self._path.open("rb") as file:
            file.seek(begin)
            return end, file.read(self._end(end - 1) - begin)

    def _end(self, index: int) -> int:
        return self._offsets[index + 1] if index + 1 < len(self._offsets) else self._size

    def _load(self) -> None:
        """Read the log there is; a last line that a killed agent left unfinished is cut off."""
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(self._path, whole)
        while self._size < whole:
            self._offsets.append(self._size)
            self._size = data.index(b"\n", self._size) + 1
        if self._offsets:
            # A killed agent leaves a line unfinished, never a wrong one: only the last is read.
            self._note_if_terminal(json.loads(data[self._offsets[-1] : whole]))

    def _note(self, event: dict[str, Any], length: int) -> None:
        self._offsets.append(self._size)
        self._size += length
        self._note_if_terminal(event)

    def _note_if_terminal(self, event: dict[str, Any]) -> None:
        if event["kind"] in TERMINAL:
            self.terminal = event
