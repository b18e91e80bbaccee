"""Which strings can be stored and shown at all. A leaf module."""

from __future__ import annotations


def unusable(text: str) -> str | None:
    """Why ``text`` can be neither stored nor sent on, as the end of a sentence; None if it can.

    PostgreSQL's ``text`` holds no NUL, and half of a surrogate pair has no UTF-8 (RFC 3629).
    """
    if "\0" in text:
        return "must not contain NUL characters."
    try:
        text.encode()
    except UnicodeEncodeError:
        return "must not contain half of a surrogate pair."
    return None


def clean(text: str) -> str:
    """``text`` with a replacement character for whatever cannot be stored."""
    return text.replace("\0", "\ufffd").encode(errors="replace").decode()
