"""Read one owner's entries from the end of an egress log, back to a given time.

Squid's logs are shared by all containers, and any container can make them grow. So they are read
from the end in chunks, a line is parsed only if it contains the owner's name, and reading stops
where the lines are older than requested, or after :data:`MAX_BYTES`. Call this in a thread.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_BYTES = 64 * 1024**2
# The latest entries of one owner in one file.
MAX_ENTRIES = 20_000
_CHUNK_BYTES = 1024**2
# Several processes append to a log, so its lines are not strictly ordered by time.
_MAX_DISORDER_SECONDS = 5.0


def read_entries(path: Path, owner: str | None, since: float) -> list[dict[str, Any]]:
    """Return the entries of an owner, or of all, since a Unix time, oldest first."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return []
    found: list[dict[str, Any]] = []
    try:
        if os.fstat(descriptor).st_mtime < since - _MAX_DISORDER_SECONDS:
            return []
        for lines in _read_backwards(descriptor):
            if owner is None or owner.encode() in lines:
                found += reversed(list(_owner_entries(lines, owner, since)))
            if len(found) >= MAX_ENTRIES or _first_timestamp(lines) < since - _MAX_DISORDER_SECONDS:
                break
    finally:
        os.close(descriptor)
    return found[:MAX_ENTRIES][::-1]


def _read_backwards(descriptor: int) -> Iterator[bytes]:
    """Yield the end of the file in chunks of complete lines, the last chunk first."""
    end = os.fstat(descriptor).st_size
    limit, partial = max(0, end - MAX_BYTES), b""
    while end > limit:
        start = max(limit, end - _CHUNK_BYTES)
        data = os.pread(descriptor, end - start, start) + partial
        # A line that starts before the chunk is completed by the next one.
        cut = data.find(b"\n") + 1 if start > 0 else 0
        partial, end = data[:cut], start
        if cut < len(data):
            yield data[cut:]


def _owner_entries(lines: bytes, owner: str | None, since: float) -> Iterator[dict[str, Any]]:
    wanted = (owner or "").encode()
    for line in lines.split(b"\n"):
        if line and wanted in line:
            entry = _parse(line)
            if owner in (None, entry.get("owner")) and entry and _timestamp(entry) >= since:
                yield entry


def _first_timestamp(lines: bytes) -> float:
    """Return the time of the first line that has one."""
    for line in lines.split(b"\n", 10)[:10]:
        if at := _timestamp(_parse(line)):
            return at
    return float("inf")


def _timestamp(entry: dict[str, Any]) -> float:
    at = entry.get("at")
    return at if isinstance(at, int | float) else 0.0


def _parse(line: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}
