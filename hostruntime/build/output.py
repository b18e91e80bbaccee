"""A step's output on its way to the log: rate-limited, bounded, made readable.

Output is sent in chunks while the step runs, at most ten a second. If there is too much, only the
head and the tail are kept: the first 8 MiB are sent as they arrive, and the last 1 MiB when the
step finishes, after a line that says how much was omitted. The heads of all steps of a build share
32 MiB; once those are used up, a step keeps its first 64 KiB.
"""

from __future__ import annotations

import asyncio
import codecs
import re
from collections.abc import Callable

HEAD_BYTES = 8 * 1024 * 1024
MIN_HEAD_BYTES = 64 * 1024
BUDGET_BYTES = 32 * 1024 * 1024
RING_BYTES = 1024 * 1024
CHUNK_BYTES = 64 * 1024
FLUSH_INTERVAL_SECONDS = 0.1
TAIL_LINES = 20
TAIL_CHARACTERS = 2000
_TAIL_BYTES = 16 * 1024
_REPLACEMENT_BYTES = 3  # U+FFFD in UTF-8
# Control sequences of ECMA-48: CSI, OSC (ended by BEL or ST), and the two-byte escapes.
_CONTROL = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])")
# A CR quoted in a message ("set: -\\r: invalid option") is the error itself, not a redraw.
_QUOTED_CR = re.compile("\r(?=[:'\"\u2019\u201d])")
_SHOWN_CR = "\u27e8U+000D\u27e9"


class OutputBudget:
    """How much output a build may still keep for the heads of its steps."""

    def __init__(self, size_bytes: int = BUDGET_BYTES) -> None:
        self._remaining = size_bytes

    def allowance(self) -> int:
        """Return how much the next step may keep."""
        return max(MIN_HEAD_BYTES, min(HEAD_BYTES, self._remaining))

    def spend(self, size_bytes: int) -> None:
        """Deduct what a step has kept."""
        self._remaining -= size_bytes


class StepOutput:
    """Collects one step's output and passes text to ``send``; for use in one event loop."""

    def __init__(self, send: Callable[[str], None], budget: OutputBudget | None = None) -> None:
        self._send = send
        self._budget = budget or OutputBudget()
        self._head_bytes = self._budget.allowance()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._pending = bytearray()
        self._ring = bytearray()
        self._tail = bytearray()
        self._timer: asyncio.TimerHandle | None = None
        self.output_bytes = 0

    @property
    def elided_bytes(self) -> int:
        """How many bytes in the middle are omitted."""
        return max(0, self.output_bytes - self._head_bytes - RING_BYTES)

    def feed(self, data: bytes) -> None:
        """Add output of the step."""
        head = max(0, self._head_bytes - self.output_bytes)
        self.output_bytes += len(data)
        self._pending += data[:head]
        _append_bounded(self._ring, data[head:], RING_BYTES)
        _append_bounded(self._tail, data, _TAIL_BYTES)
        if self._pending and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(
                FLUSH_INTERVAL_SECONDS, self._on_timer
            )

    def finish(self) -> None:
        """Send everything that remains; nothing is sent after this."""
        self.stop()
        self._budget.spend(min(self.output_bytes, self._head_bytes))
        while self._pending:
            self._flush_chunk()
        if self.elided_bytes:
            self._send_text(self._decoder.decode(b"", final=True))
            self._decoder.reset()
            head, tail = _format_size(self._head_bytes), _format_size(RING_BYTES)
            self._send_text(
                f"\n[… {self.elided_bytes:,} bytes of output omitted here: the first {head} and "
                f"the last {tail} of a step are kept …]\n"
            )
        self._pending = self._ring[-RING_BYTES:]
        if self.elided_bytes:
            _drop_partial_character(self._pending)
        while self._pending:
            self._flush_chunk()
        self._send_text(self._decoder.decode(b"", final=True))

    def stop(self) -> None:
        """Stop sending periodically."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def tail(self) -> str:
        """Return the last lines in readable form, without control sequences."""
        return readable_tail(self._tail[-_TAIL_BYTES:].decode("utf-8", "replace"))

    def _on_timer(self) -> None:
        self._timer = None
        self._flush_chunk()
        if self._pending:
            self._timer = asyncio.get_running_loop().call_later(
                FLUSH_INTERVAL_SECONDS, self._on_timer
            )

    def _flush_chunk(self) -> None:
        chunk = bytes(self._pending[:CHUNK_BYTES])
        if not chunk.isascii():
            # Each byte may become a replacement character.
            chunk = chunk[: CHUNK_BYTES // _REPLACEMENT_BYTES]
        del self._pending[: len(chunk)]
        self._send_text(self._decoder.decode(chunk))

    def _send_text(self, text: str) -> None:
        if text:
            self._send(text.replace("\0", "\ufffd"))


def readable_tail(text: str) -> str:
    """Return the last :data:`TAIL_LINES` lines of terminal output, at most TAIL_CHARACTERS.

    Of lines redrawn with CR, such as progress bars, only the final state is kept.
    """
    lines = [
        line.rstrip("\r").rpartition("\r")[2].rstrip() for line in _strip_controls(text).split("\n")
    ]
    tail = "\n".join("\n".join(lines).strip("\n").split("\n")[-TAIL_LINES:])
    if len(tail) <= TAIL_CHARACTERS:
        return tail
    return "…" + tail[-TAIL_CHARACTERS:]


def _strip_controls(text: str) -> str:
    text = _CONTROL.sub("", text).replace("\0", "\ufffd")
    return _QUOTED_CR.sub(_SHOWN_CR, text)


def _format_size(size_bytes: int) -> str:
    if size_bytes >= 1024 * 1024:
        return f"{size_bytes / (1024 * 1024):.3g} MiB"
    return f"{size_bytes // 1024} KiB"


def _append_bounded(buffer: bytearray, data: bytes, limit: int) -> None:
    buffer += data[-limit:]
    # Trim rarely: it moves everything that is kept.
    if len(buffer) > 2 * limit:
        del buffer[:-limit]


def _drop_partial_character(buffer: bytearray) -> None:
    """Remove the rest of a UTF-8 character whose first bytes were omitted."""
    count = 0
    while count < min(3, len(buffer)) and buffer[count] & 0xC0 == 0x80:
        count += 1
    del buffer[:count]
