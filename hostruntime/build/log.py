"""A build's events: numbered from 1 without gaps, and written to disk before followers see them.

``events.ndjson`` has one JSON object per line. Followers read the file, not memory, so any number
of slow followers costs nothing, and a log reads the same after a restart. The file is read and
written in threads; events appended meanwhile are queued, and a build's output is bounded.
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

TERMINAL_KINDS = frozenset({"published", "failed"})
KEEP_ALIVE_SECONDS = 10.0
_BATCH_BYTES = 1024 * 1024


@dataclass(frozen=True)
class _Event:
    fields: dict[str, Any]
    line: bytes


class EventLog:
    """The events of one build, appended to and followed in one event loop.

    The constructor blocks: it reads an existing log.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pending: list[_Event] = []
        self._writer: asyncio.Task[None] | None = None
        self._failure: Exception | None = None
        # Called in the writer's thread once the terminal event is on disk.
        self._on_terminal: Callable[[], None] = lambda: None
        self._offsets: list[int] = []
        self._size = 0
        self._followers: set[asyncio.Event] = set()
        self.terminal: dict[str, Any] | None = None
        self._load()
        self._finished = self.terminal is not None

    @property
    def last_seq(self) -> int:
        """The number of the latest event on disk, 0 if there is none."""
        return len(self._offsets)

    def append(self, kind: str, /, **fields: Any) -> None:
        """Number an event and queue it; once it is written, the followers are woken.

        Raises OSError if an earlier event could not be written.
        """
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        self._enqueue(kind, fields)

    async def finish(
        self, kind: str, on_terminal: Callable[[], None] = lambda: None, /, **fields: Any
    ) -> None:
        """Write the terminal event and everything before it, and sync them to disk.

        ``on_terminal`` is called in a thread once it is on disk, before followers see it. Raises
        OSError if the event cannot be written, and whatever ``on_terminal`` raises.
        """
        self._failure, self._on_terminal = None, on_terminal
        self._enqueue(kind, fields)
        await self.flush()

    async def flush(self) -> None:
        """Wait until everything appended is on disk.  Raises OSError."""
        while self._pending and self._failure is None:
            self._wake_writer()
            assert self._writer is not None
            await asyncio.wait([self._writer])
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _enqueue(self, kind: str, fields: Mapping[str, Any]) -> None:
        assert not self._finished, "a build has one terminal event"
        self._finished = kind in TERMINAL_KINDS
        seq = self.last_seq + len(self._pending) + 1
        event = {"seq": seq, "at": time.time(), "kind": kind, **fields}
        self._pending.append(_Event(event, json.dumps(event).encode() + b"\n"))
        self._wake_writer()

    def _wake_writer(self) -> None:
        if self._writer is None:
            self._writer = asyncio.create_task(self._write_all(), name="a build's events")

    async def _write_all(self) -> None:
        try:
            while self._pending:
                batch = list(self._pending)
                await in_thread(self._write, batch)
                del self._pending[: len(batch)]
                if batch[-1].fields["kind"] in TERMINAL_KINDS:
                    await self._run_on_terminal()
                for event in batch:
                    self._index(event.fields, len(event.line))
                for follower in self._followers:
                    follower.set()
        except Exception as error:  # noqa: BLE001 - raised by the next append or flush
            self._failure = error
        finally:
            self._writer = None

    async def _run_on_terminal(self) -> None:
        try:
            await in_thread(self._on_terminal)
        except OSError as error:
            self._failure = error

    def _write(self, batch: Sequence[_Event]) -> None:
        remaining = memoryview(b"".join(event.line for event in batch))
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        descriptor = os.open(self._path, flags, 0o644)
        try:
            try:
                while remaining:
                    remaining = remaining[os.write(descriptor, remaining) :]
            except OSError:
                # No partial line must remain, nor a duplicate when the batch is retried.
                os.ftruncate(descriptor, self._size)
                raise
            if batch[-1].fields["kind"] in TERMINAL_KINDS:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)

    async def follow(
        self, after: int = 0, *, follow: bool = True, keep_alive: float = KEEP_ALIVE_SECONDS
    ) -> AsyncIterator[bytes]:
        """Yield the events numbered above ``after`` as lines, several at a time.

        With ``follow``, until the terminal event, with an empty line after every ``keep_alive``
        seconds of silence; otherwise only those there are now.
        """
        position = max(0, after)
        changed = asyncio.Event()
        self._followers.add(changed)
        try:
            if not follow:
                await self.flush()
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
        while end < self.last_seq and self._end_offset(end) - begin <= _BATCH_BYTES:
            end += 1
        with self._path.open("rb") as file:
            file.seek(begin)
            return end, file.read(self._end_offset(end - 1) - begin)

    def _end_offset(self, index: int) -> int:
        return self._offsets[index + 1] if index + 1 < len(self._offsets) else self._size

    def _load(self) -> None:
        """Read an existing log; truncate a last line that a killed agent left incomplete."""
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return
        complete = data.rfind(b"\n") + 1
        if complete < len(data):
            os.truncate(self._path, complete)
        while self._size < complete:
            self._offsets.append(self._size)
            self._size = data.index(b"\n", self._size) + 1
        if self._offsets:
            # A killed agent may leave an incomplete line, never a wrong one: parse only the last.
            self._set_if_terminal(json.loads(data[self._offsets[-1] : complete]))

    def _index(self, event: dict[str, Any], length: int) -> None:
        self._offsets.append(self._size)
        self._size += length
        self._set_if_terminal(event)

    def _set_if_terminal(self, event: dict[str, Any]) -> None:
        if event["kind"] in TERMINAL_KINDS:
            self.terminal = event
