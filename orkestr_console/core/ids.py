"""Identifiers: a prefix for the kind of object, and a ULID, which sorts by creation time.

A leaf module: it imports nothing of the project.
"""

from __future__ import annotations

import re

from ulid import ULID

# Crockford's base 32 as the ULID specification has it; the first digit holds only three bits.
_ULID = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}", re.ASCII)


def new_id(prefix: str) -> str:
    """A new identifier: ``new_id("tmpl")`` is like ``tmpl_01J…`` (prefix, ``_``, 26 digits)."""
    return f"{prefix}_{ULID()}"


def is_id(prefix: str, value: str) -> bool:
    """Whether ``value`` is well formed as an identifier with this prefix, upper case only."""
    return value.startswith(f"{prefix}_") and _ULID.fullmatch(value, len(prefix) + 1) is not None
