"""What a bridge sends of a kernel's output: results, text and exceptions, within bounds.

Not imported by the agent: it is sent along with :mod:`hostruntime.container.inside_bridge`, and is
for the same Pythons.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

# Bounds, in characters or bytes; the host's are a little larger.
_MAX_STREAM = 2 * 1024 * 1024
_MAX_KEPT = 64 * 1024
_MAX_RESULTS = 64
_MAX_ALL_RESULTS = 8 * 1024 * 1024
_MAX_REPRESENTATION = {
    "text": 256 * 1024,
    "html": 1024 * 1024,
    "svg": 1024 * 1024,
    "png": 4 * 1024 * 1024,
    "json": 1024 * 1024,
    "chart": 512 * 1024,
}
_MAX_ERROR_TEXT = 16 * 1024
_MAX_TRACEBACK_LINES, _MAX_TRACEBACK_LINE = 100, 8 * 1024
_MAX_DEPTH = 40

_ANSI = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
_MIME = {
    "text/plain": "text",
    "text/html": "html",
    "image/svg+xml": "svg",
    "image/png": "png",
    "application/json": "json",
    "application/vnd.orkestr.chart+json": "chart",
}


def plain_text(text: str) -> str:
    """Text without the escape sequences of terminals (ECMA-48)."""
    return _ANSI.sub("", text)


class Outputs:
    """Turns a kernel's messages into lines for the host, within the bounds."""

    def __init__(self) -> None:
        self.truncated: list[str] = []
        self.error: dict[str, Any] | None = None
        self._streamed = {"stdout": 0, "stderr": 0}
        self._results = 0
        self._result_size = 0

    def cut(self, what: str) -> None:
        """Note that something was left out."""
        if what not in self.truncated:
            self.truncated.append(what)

    def lines(self, kind: str, content: dict[str, Any], whole: bool) -> list[dict[str, Any]]:
        """The lines for a message, none or one."""
        if kind == "stream":
            return self._stream(content, whole)
        if kind in ("execute_result", "display_data"):
            return self._result(content.get("data"), whole)
        if kind == "error":
            return [self.failure(content, whole)]
        return []

    def _stream(self, content: dict[str, Any], whole: bool) -> list[dict[str, Any]]:
        name = "stderr" if content.get("name") == "stderr" else "stdout"
        room = _MAX_STREAM - self._streamed[name]
        text = content.get("text")
        text = text if isinstance(text, str) else ""
        if not whole or len(text) > room:
            self.cut(name)
            text = text[: max(room, 0)]
        self._streamed[name] += len(text)
        return [{"kind": "stream", "stream": name, "text": text}] if text else []

    def _result(self, data: Any, whole: bool) -> list[dict[str, Any]]:
        result: dict[str, Any] = {}
        for mime, name in _MIME.items() if isinstance(data, dict) else ():
            value = _representation(name, data[mime]) if mime in data else None
            if value is None:
                continue
            size = len(value) if isinstance(value, str) else len(json.dumps(value))
            if size <= _MAX_REPRESENTATION[name]:
                result[name] = value
            else:
                self.cut(f"result.{name}")
                if name == "text":
                    result[name] = value[: _MAX_REPRESENTATION[name]]
        size = len(json.dumps(result))
        full = self._results >= _MAX_RESULTS or self._result_size + size > _MAX_ALL_RESULTS
        if full or not whole:
            self.cut("results")
            return []
        self._results += 1
        self._result_size += size
        return [{"kind": "result", "result": result}] if result else []

    def failure(self, content: dict[str, Any], whole: bool = True) -> dict[str, Any]:
        """The line for an exception."""
        name, value, traceback = (content.get(key) for key in ("ename", "evalue", "traceback"))
        given = [str(line) for line in traceback] if isinstance(traceback, list) else []
        lines = [plain_text(line)[:_MAX_TRACEBACK_LINE] for line in given]
        if len(lines) > _MAX_TRACEBACK_LINES:
            half = _MAX_TRACEBACK_LINES // 2
            lines = [*lines[:half], "[… lines left out here …]", *lines[-half:]]
        text = str(value or "")
        if not whole:
            text = "It has more text than is kept."
        cut = len(text) > _MAX_ERROR_TEXT or any(len(x) > _MAX_TRACEBACK_LINE for x in given)
        if cut or len(lines) < len(given) or not whole:
            self.cut("error")
        self.error = {
            "name": str(name or "Error")[:200],
            "value": text[:_MAX_ERROR_TEXT],
            "traceback": lines,
        }
        return {"kind": "error", "error": self.error}


class Kept:
    """What threads print while nothing runs, which comes with the next run: the end of it."""

    def __init__(self) -> None:
        self._pieces: list[tuple[dict[str, Any], bool]] = []
        self._size = 0
        self._cut = False

    def add(self, content: dict[str, Any], whole: bool) -> None:
        """Keep a message of the kind ``stream``."""
        self._pieces.append((content, whole))
        self._size += len(str(content.get("text")))
        while self._size > _MAX_KEPT:
            self._size -= len(str(self._pieces.pop(0)[0].get("text")))
            self._cut = True

    def take(self, outputs: Outputs) -> list[dict[str, Any]]:
        """The lines of all that was kept."""
        if self._cut:
            outputs.cut("stdout")
        pieces, self._pieces, self._size, self._cut = self._pieces, [], 0, False
        lines = (outputs.lines("stream", content, whole) for content, whole in pieces)
        return [line for each in lines for line in each]


def _representation(name: str, value: Any) -> Any:
    """A representation as it is sent; None if it is none."""
    if name in ("json", "chart"):
        try:
            value = _plain(value, _MAX_DEPTH)
        except ValueError:
            return None
        return value if isinstance(value, (dict, list) if name == "json" else dict) else None
    if isinstance(value, list):
        value = "".join(each for each in value if isinstance(each, str))
    if not isinstance(value, str):
        return None
    return "".join(value.split()) if name == "png" else value


def _plain(value: Any, depth: int) -> Any:
    """A copy that is JSON everywhere.  Raises ValueError if it is too deep."""
    if depth <= 0:
        raise ValueError("too deep")
    if isinstance(value, dict):
        return {str(key): _plain(each, depth - 1) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each, depth - 1) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**63:
        return str(value)
    return value
