"""Whether this web process is shutting down, which explains why responses are cut off."""

from __future__ import annotations

_stopping = False


def mark_stopping() -> None:
    """Record that the server is cancelling what still runs."""
    global _stopping
    _stopping = True


def cut_off_reason() -> str:
    """Why a response in progress was abandoned."""
    return "the server was stopped" if _stopping else "the client went away"
