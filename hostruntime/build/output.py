"""A step's output on its way to the log: paced, bounded, made readable.

What a step writes is sent in pieces while it runs, at most ten a second.  Of very much of it the
beginning and the end are kept: the first 8 MiB, sent as they come, and the last 1 MiB, sent when
the step ends, behind a line that says how much was left out.  The beginnings of all steps of a
build have 32 MiB together; when those are used up a step keeps the first 64 KiB.
"""

from __future__ import annotations

import asyncio
import codecs
import re
from collections.abc import Callable

LIVE_BYTES = 8 * 1024 * 1024
LEAST_LIVE_BYTES = 64 * 1024
BUDGET_BYTES = 32 * 1024 * 1024
RING_BYTES = 1024 * 1024
PIECE_BYTES = 64 * 1024
PACE_SECONDS = 0.1
TAIL_LINES = 20
TAIL_CHARACTERS = 2000
_TAIL_BYTES = 16 * 1024
_REPLACEMENT_BYTES = 3  # U+FFFD in UTF-8
# Control sequences of ECMA-48: CSI, OSC (ended by BEL or ST), and the two-byte escapes.
_CONTROL = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])")
# A CR that a message quotes ("set: -\\r: invalid option") draws nothing over; it is what was wrong.
_QUOTED_CR = re.compile("\r(?=[:'\"\u2019\u201d])")
_SHOWN_CR = "\u27e8U+000D\u27e9"


class OutputBudget:
    """How much of the beginnings of its steps' output a build may still keep."""

    def __init__(self, size_bytes: int = BUDGET_BYTES) -> None:
        self._left = size_bytes

    def share(self) -> int:
        """How much the next step may keep."""
        return max(LEAST_LIVE_BYTES, min(LIVE_BYTES, self._left))

    def take(self, size_bytes: int) -> None:
        """A step has kept that much."""
        self._left -= size_bytes


class StepOutput:
    """Collects one step's output; ``send`` gets each piece of text.  For one event loop."""

    def __init__(self, send: Callable[[str], None], budget: OutputBudget | None = None) -> None:
        self._send = send
        self._budget = budget or OutputBudget()
        self._live_bytes = self._budget.share()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._pending = bytearray()
        self._ring = bytearray()
        self._tail = bytearray()
        self._timer: asyncio.TimerHandle | None = None
        self.output_bytes = 0

    @property
    def elided_bytes(self) -> int:
        """How many bytes in the middle are left out."""
        return max(0, self.output_bytes - self._live_bytes - RING_BYTES)

    def feed(self, data: bytes) -> None:
        """Take what the step wrote."""
        live = max(0, self._live_bytes - self.output_bytes)
        self.output_bytes += len(data)
        self._pending += data[:live]
        _keep_last(self._ring, data[live:], RING_BYTES)
        _keep_last(self._tail, data, _TAIL_BYTES)
        if self._pending and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(PACE_SECONDS, self._flush_one)

    def finish(self) -> None:
        """Send everything that is left; no piece is sent after this."""
        self.stop()
        self._budget.take(min(self.output_bytes, self._live_bytes))
        while self._pending:
            self._flush_piece()
        if self.elided_bytes:
            self._send_text(self._decoder.decode(b"", final=True))
            self._decoder.reset()
            self._send_text(
                f"\n[… {self.elided_bytes:,} bytes of output left out here: of this step the first "
                f"{_in_words(self._live_bytes)} and the last {_in_words(RING_BYTES)} are kept …]\n"
            )
        self._pending = self._ring[-RING_BYTES:]
        if self.elided_bytes:
            _drop_partial_character(self._pending)
        while self._pending:
            self._flush_piece()
        self._send_text(self._decoder.decode(b"", final=True))

    def stop(self) -> None:
        """Send nothing more by itself."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def tail(self) -> str:
        """The last lines for a person to read: no control sequences, progress bars' last state."""
        return readable_tail(self._tail[-_TAIL_BYTES:].decode("utf-8", "replace"))

    def _flush_one(self) -> None:
        self._timer = None
        self._flush_piece()
        if self._pending:
            self._timer = asyncio.get_running_loop().call_later(PACE_SECONDS, self._flush_one)

    def _flush_piece(self) -> None:
        piece = bytes(self._pending[:PIECE_BYTES])
        if not piece.isascii():
            # Every byte of it may become a replacement character.
            piece = piece[: PIECE_BYTES // _REPLACEMENT_BYTES]
        del self._pending[: len(piece)]
        self._send_text(self._decoder.decode(piece))

    def _send_text(self, text: str) -> None:
        if text:
            self._send(text.replace("\0", "\ufffd"))


def readable_tail(text: str) -> str:
    """The last :data:`TAIL_LINES` lines of a terminal's text, at most TAIL_CHARACTERS."""
    lines = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in _seen(text).split("\n")]
    tail = "\n".join("\n".join(lines).strip("\n").split("\n")[-TAIL_LINES:])
    if len(tail) <= TAIL_CHARACTERS:
        return tail
    return "…" + tail[-TAIL_CHARACTERS:]


def _seen(text: str) -> str:
    text = _CONTROL.sub("", text).replace("\0", "\ufffd")
    return _QUOTED_CR.sub(_SHOWN_CR, text)


def _in_words(size_bytes: int) -> str:
    if size_bytes >= 1024 * 1024:
        return f"{size_bytes / (1024 * 1024):.3g} MiB"
    return f"{size_bytes // 1024} KiB"


def _keep_last(buffer: bytearray, data: bytes, limit: int) -> None:
    buffer += data[-limit:]
    # Cut rarely: moving the rest up costs as much as what is kept.
    if len(buffer) > 2 * limit:
        del buffer[:-limit]


def _drop_partial_character(buffer: bytearray) -> None:
    """Remove the rest of a UTF-8 character whose beginning was left out."""
    count = 0
    while count < min(3, len(buffer)) and buffer[count] & 0xC0 == 0x80:
        count += 1
    del buffer[:count]
