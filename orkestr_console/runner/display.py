"""The operator's view of a start: one line per step, and one progress line."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TextIO

LABEL_WIDTH = 24
DETAIL_WIDTH = 46
CLEAR_LINE = "\r\x1b[2K"


@dataclass
class Step:
    """A running step; its ``detail`` is printed when it is done."""

    label: str
    detail: str = ""
    started: float = field(default_factory=time.monotonic)


class Display:
    """Prints steps from several threads without mixing their lines.

    A closed terminal, or a file on a full disk, must not stop the work that it reports.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._interactive = stream.isatty()
        self._lock = threading.Lock()
        self._progress: dict[str, str] = {}
        encoding = (stream.encoding or "ascii").lower()
        self._done, self._warn, self._busy = (
            ("✓", "!", "…") if "utf" in encoding else ("+", "!", ".")
        )

    @contextmanager
    def step(self, label: str) -> Iterator[Step]:
        """Time a block and print its line if it succeeds; an exception prints nothing here."""
        step = Step(label)
        try:
            yield step
        except BaseException:
            self._clear_progress(label)
            raise
        seconds = time.monotonic() - step.started
        self._clear_progress(label)
        self.line(
            f"  {self._done} {label:<{LABEL_WIDTH}}{step.detail:<{DETAIL_WIDTH}}{seconds:6.1f} s"
        )

    def progress(self, label: str, message: str) -> None:
        """Show the current progress of ``label``: on the progress line, or as a line of its own."""
        message = " ".join(message.split())[: DETAIL_WIDTH + 10]
        with self._lock:
            if self._progress.get(label) == message:
                return
            self._progress[label] = message
            with suppress(OSError):
                if self._interactive:
                    self._redraw()
                else:
                    self._stream.write(f"  {self._busy} {label:<{LABEL_WIDTH}}{message}\n")
                    self._stream.flush()

    def _clear_progress(self, label: str) -> None:
        with self._lock:
            self._progress.pop(label, None)

    def warn(self, text: str) -> None:
        """Print something the operator should know that doesn't stop the start."""
        self.line(f"  {self._warn} {text}")

    def line(self, text: str = "") -> None:
        """Print a line above the progress line."""
        with self._lock, suppress(OSError):
            self._stream.write(f"{CLEAR_LINE if self._interactive else ''}{text}\n")
            if self._interactive:
                self._redraw()
            self._stream.flush()

    def _redraw(self) -> None:
        self._stream.write(CLEAR_LINE)
        for label, message in list(self._progress.items())[:1]:
            self._stream.write(f"  {self._busy} {label:<{LABEL_WIDTH}}{message}")
        self._stream.flush()

    def times(self, rows: Sequence[tuple[str, float]]) -> None:
        """A short table of named times in seconds."""
        for label, seconds in rows:
            self.line(f"      {label:<{LABEL_WIDTH + DETAIL_WIDTH - 5}}{seconds * 1000:6.0f} ms")
