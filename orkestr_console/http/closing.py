"""Whether this web process is being stopped: what it then cuts off did not end by itself."""

from __future__ import annotations

_stopped = False


def note_stopped() -> None:
    """From now on the server itself ends what still runs."""
    global _stopped
    _stopped = True


def why_cut_off() -> str:
    """Why an answer that was under way is not waited for any more."""
    return "the server was stopped" if _stopped else "the client went away"
