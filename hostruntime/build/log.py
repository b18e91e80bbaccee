"""A build's events: numbered from 1 without a gap, on disk before anybody is told of them.

One JSON object a line in ``events.ndjson``.  Followers read the file, never memory, so any
number of them, however slow, costs nothing, and a log reads the same after a restart.  The file is
read and written in threads; what is appended meanwhile waits, and a build's output is bounded.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hostruntime.host.tasks import in_thread

TERMINAL = frozenset({"published", "failed"})
KEEP_ALIVE_SECONDS = 10.0
_BATCH_BYTES = 1024 * 1024


@dataclass(frozen=True)
class _Event:
    fields: dict[str, Any]
    line: bytes


class EventLog:
    """The events of one build.  Appended to, and followed, in one event loop.

    To make one blocks: it reads the log there is.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: list[_Event] = []
        self._writer: asyncio.Task[None] | None = None
        self._failure: Exception | None = None
        # Called in the writer's thread once the terminal event is on disk.
        self._then: Callable[[], None] = lambda: None
        self._offsets: list[int] = []
        self._size = 0
        self._followers: set[asyncio.Event] = set()
        self.terminal: dict[str, Any] | None = None
        self._load()
        self._ended = self.terminal is not None

    @property
    def last_seq(self) -> int:
        """The number of the latest event on disk, 0 without any."""
        return len(self._offsets)

    def append(self, kind: str, /, **fields: Any) -> None:
        """Number an event; it is written next, and then the followers are woken.

        Raises OSError when what was appended before could not be written.
        """
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        self._queue(kind, fields)

    async def finish(
        self, kind: str, then: Callable[[], None] = lambda: None, /, **fields: Any
    ) -> None:
        """Write the terminal event, for good, and all before it.

        ``then`` is called in a thread when it is on disk, and before anybody is told.  Raises
        OSError when the event cannot be written, and what ``then`` raises.
        """
        self._failure, self._then = None, then
        self._queue(kind, fields)
        await self.written()

    async def written(self) -> None:
        """Wait until everything that was appended is on disk.  Raises OSError."""
        while self._waiting and self._failure is None:
            self._wake_writer()
            assert self._writer is not None
            await asyncio.wait([self._writer])
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _queue(self, kind: str, fields: Mapping[str, Any]) -> None:
        assert not self._ended, "a build ends once"
        self._ended = kind in TERMINAL
        seq = self.last_seq + len(self._waiting) + 1
        event = {"seq": seq, "at": time.time(), "kind": kind, **fields}
        self._waiting.append(_Event(event, json.dumps(event).encode() + b"\n"))
        self._wake_writer()

    def _wake_writer(self) -> None:
        if self._writer is None:
            self._writer = asyncio.create_task(self._write_all(), name="a build's events")

    async def _write_all(self) -> None:
        try:
            while self._waiting:
                batch = list(self._waiting)
                await in_thread(self._write, batch)
                del self._waiting[: len(batch)]
                if batch[-1].fields["kind"] in TERMINAL:
                    await self._call_then()
                for event in batch:
                    self._note(event.fields, len(event.line))
                for follower in self._followers:
                    follower.set()
        except Exception as error:  # noqa: BLE001 - who appends next, or waits, is told
            self._failure = error
        finally:
            self._writer = None

    async def _call_then(self) -> None:
        try:
            await in_thread(self._then)
        except OSError as error:
            self._failure = error

    def _write(self, batch: Sequence[_Event]) -> None:
        left = memoryview(b"".join(event.line for event in batch))
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        descriptor = os.open(self._path, flags, 0o644)
        try:
            try:
                while left:
                    left = left[os.write(descriptor, left) :]
            except OSError:
                # Not half a line, nor one twice when they are written again.
                os.ftruncate(descriptor, self._size)
                raise
            if batch[-1].fields["kind"] in TERMINAL:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)

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
            if not follow:
                await self.written()
            while True:
                changed.clear()
                while position < self.last_seq:
                    position, lines = await asyncio.to_thread(self._read, position)
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
