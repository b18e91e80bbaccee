"""Reading the egress logs: the end of a file, as far back as is asked for, and one owner's lines.

The logs that Squid writes are those of all containers, and any of them can make one grow by what
it does.  So they are read from their end in pieces, a line is parsed only if the owner's name is
in it, reading ends where the lines are older than what is wanted, and in any case after
:data:`MOST_BYTES`.  To be called in a thread.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MOST_BYTES = 64 * 1024**2
# Of one owner in one file; the latest.
MOST_ENTRIES = 20_000
_PIECE = 1024**2
# Several processes append to a log, each with its own idea of when it began to.
_DISORDER_SECONDS = 5.0


def entries_of(path: Path, owner: str | None, since: float) -> list[dict[str, Any]]:
    """An owner's entries, or everybody's, since a Unix time, oldest first; none without a file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return []
    found: list[dict[str, Any]] = []
    try:
        if os.fstat(descriptor).st_mtime < since - _DISORDER_SECONDS:
            return []
        for lines in _backwards(descriptor):
            if owner is None or owner.encode() in lines:
                found += reversed(list(_of_owner(lines, owner, since)))
            if len(found) >= MOST_ENTRIES or _first_at(lines) < since - _DISORDER_SECONDS:
                break
    finally:
        os.close(descriptor)
    return found[:MOST_ENTRIES][::-1]


def _backwards(descriptor: int) -> Iterator[bytes]:
    """The file's last bytes in pieces of whole lines, the last piece first."""
    end = os.fstat(descriptor).st_size
    limit, begun = max(0, end - MOST_BYTES), b""
    while end > limit:
        start = max(limit, end - _PIECE)
        data = os.pread(descriptor, end - start, start) + begun
        # What began before the piece waits for the rest of it.
        cut = data.find(b"\n") + 1 if start > 0 else 0
        begun, end = data[:cut], start
        if cut < len(data):
            yield data[cut:]


def _of_owner(lines: bytes, owner: str | None, since: float) -> Iterator[dict[str, Any]]:
    wanted = (owner or "").encode()
    for line in lines.split(b"\n"):
        if line and wanted in line:
            entry = _parsed(line)
            if owner in (None, entry.get("owner")) and entry and _at(entry) >= since:
                yield entry


def _first_at(lines: bytes) -> float:
    """When the first line that says so was written."""
    for line in lines.split(b"\n", 10)[:10]:
        if at := _at(_parsed(line)):
            return at
    return float("inf")


def _at(entry: dict[str, Any]) -> float:
    at = entry.get("at")
    return at if isinstance(at, int | float) else 0.0


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}
