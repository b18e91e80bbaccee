"""Whether this web process is being stopped: what it then cuts off did not end by itself."""

from __future__ import annotations

_stopping = False


def mark_stopping() -> None:
    """From now on the server itself ends what still runs."""
    global _stopping
    _stopping = True


def cut_off_reason() -> str:
    """Why an answer that was under way is not waited for any more."""
    return "the server was stopped" if _stopping else "the client went away"
