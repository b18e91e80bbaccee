"""Finding lines in a file and replacing text in one (:mod:`hostruntime.container.inside_files`).

A file may have any size: what looks for lines holds one piece of it.  What replaces text holds all
of a file, so that has a limit, before and after.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

PIECE_BYTES = 256 * 1024
# Looking for a line reads all that is before it.
MAX_SCANNED_BYTES = 8 * 1024 * 1024 * 1024
MAX_EDITED_BYTES = 16 * 1024 * 1024
_SHOWN_LINES = 5
TOO_LARGE = (
    f"has more than {MAX_EDITED_BYTES:,} bytes, the most that can be edited here; use a command "
    "such as sed."
)

# Reads so many bytes at an offset, or fewer at the end.
type ReadAt = Callable[[int, int], bytes]


class TextError(Exception):
    """It can't be done; ``code`` is one of :mod:`hostruntime.errors`."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail


class Edited(NamedTuple):
    """A file's new content, how often the text was replaced, and the first line where it was."""

    content: bytes
    times: int
    line: int


def reader(fd: int, content: bytes | None) -> ReadAt:
    """What reads a file, or its ``content`` if that is known."""

    def read_at(offset: int, count: int) -> bytes:
        if content is None:
            return os.pread(fd, count, offset)
        return content[offset : offset + count]

    return read_at


def line_range(
    read_at: ReadAt, size: int, line: int, lines: int | None, most: int
) -> tuple[int, int]:
    """The offset and the length in bytes of ``lines`` lines from number ``line`` on.

    Lines count from 1; a negative number counts from the last.  All that follow without ``lines``,
    but no more than ``most`` bytes.  Raises ``TextError`` for a line that there is not.
    """
    first = _line_start(read_at, size, line) if line > 0 else _line_from_end(read_at, size, -line)
    part = read_at(first, min(most, size - first))
    return first, len(part) if lines is None else _after_newlines(part, lines)


def _line_start(read_at: ReadAt, size: int, line: int) -> int:
    offset, remaining = 0, line - 1
    while offset < size:
        if not remaining:
            return offset
        _require_scannable(offset)
        piece = read_at(offset, PIECE_BYTES)
        if not piece:
            break
        found = piece.count(b"\n")
        if found >= remaining:
            offset += _after_newlines(piece, remaining)
            remaining = 0
        else:
            offset, remaining = offset + len(piece), remaining - found
    if size == 0 and line == 1:
        return 0
    # What follows the last newline is a line as well, if there is anything.
    lines = line - 1 - remaining + (size > 0 and read_at(size - 1, 1) != b"\n")
    raise TextError("range_not_satisfiable", f"has only {lines:,} lines")


def _line_from_end(read_at: ReadAt, size: int, lines: int) -> int:
    # The newline at the end of the file begins no line.
    end = size - 1 if size and read_at(size - 1, 1) == b"\n" else size
    remaining = lines
    while end > 0:
        _require_scannable(size - end)
        begin = max(end - PIECE_BYTES, 0)
        piece = read_at(begin, end - begin)
        found = piece.count(b"\n")
        if found >= remaining:
            at = len(piece)
            for _ in range(remaining):
                at = piece.rindex(b"\n", 0, at)
            return begin + at + 1
        end, remaining = begin, remaining - found
    return 0


def _after_newlines(piece: bytes, count: int) -> int:
    """The offset after so many newlines; that of the end if there are fewer."""
    at = 0
    for _ in range(count):
        at = piece.find(b"\n", at) + 1
        if not at:
            return len(piece)
    return at


def _require_scannable(scanned: int) -> None:
    if scanned > MAX_SCANNED_BYTES:
        raise TextError("file_too_large", "has too much before that line; use an offset")


def replaced(content: bytes, old: bytes, new: bytes, count: int | None) -> Edited:
    """Replace ``old``, which must occur ``count`` times, or at least once if that is None.

    Raises ``TextError``: it occurs another number of times, or the result would be too large.
    """
    found = content.count(old)
    if not found:
        raise TextError("text_not_found", _why_missing(content, old))
    if count is not None and found != count:
        raise TextError("text_not_found", _which(content, old, found, count))
    if len(content) + found * (len(new) - len(old)) > MAX_EDITED_BYTES:
        raise TextError(
            "file_too_large",
            f"would have more than {MAX_EDITED_BYTES:,} bytes afterwards; edit it with a command",
        )
    line = content.count(b"\n", 0, content.find(old)) + 1
    return Edited(content.replace(old, new), found, line)


def _why_missing(content: bytes, old: bytes) -> str:
    said = "does not have that text; it must match exactly, with all white space"
    if b"\r\n" in content and old.replace(b"\n", b"\r\n") in content:
        said += ". The file's lines end in CR LF: write \\r\\n"
    return said


def _which(content: bytes, old: bytes, found: int, count: int) -> str:
    lines, at, line, counted = [], -1, 1, 0
    for _ in range(min(found, _SHOWN_LINES)):
        at = content.find(old, at + 1 if at < 0 else at + len(old))
        line += content.count(b"\n", counted, at)
        counted = at
        lines.append(str(line))
    more = ", …" if found > _SHOWN_LINES else ""
    times = "once" if count == 1 else f"{count:,} times"
    return (
        f"has that text {found:,} times (lines {', '.join(lines)}{more}), not {times}; add more of "
        "what is around it, or replace all"
    )
