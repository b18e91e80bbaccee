"""Requests for a part of a file (RFC 9110, section 14)."""

from __future__ import annotations

import re

from hostruntime.wire.files import FilePart, WantedPart

# One range of bytes; a number longer than that is larger than any file.
_ONE_RANGE = re.compile(r"bytes=[ \t]*(\d{0,18})-(\d{0,18})[ \t]*", re.ASCII | re.IGNORECASE)
EVERYTHING = WantedPart()


def wanted_part(header: str | None) -> WantedPart:
    """The part that a ``Range`` header asks for.

    All of the file without one, and for what a server may ignore: several ranges, another unit, or
    one that isn't valid.
    """
    found = _ONE_RANGE.fullmatch(header or "")
    if found is None or found[1] == found[2] == "":
        return EVERYTHING
    first, last = (int(digits) if digits else None for digits in found.groups())
    if first is not None and last is not None and first > last:
        return EVERYTHING
    return WantedPart(first, last)


def content_range(part: FilePart) -> str:
    """The ``Content-Range`` of a part."""
    return f"bytes {part.first}-{part.first + part.length - 1}/{part.stat.size}"
