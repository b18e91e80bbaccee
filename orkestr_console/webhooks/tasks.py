"""Worker tasks for webhooks. Each is safe to run twice."""

from __future__ import annotations

from datetime import timedelta

from orkestr_console.webhooks import claims
from orkestr_console.webhooks.sender import sender

# How long the results of deliveries can be read.
KEPT = timedelta(days=7)


def deliver() -> None:
    """Send what is due, in the background; over at once."""
    sender.wake()


def tidy() -> None:
    """Every minute: forget old results, give up what has waited too long, and send what is due.

    The last is for what a worker was sending, or waiting to repeat, when it was killed.
    """
    claims.forget(KEPT)
    claims.drop_overdue()
    if claims.are_left():
        sender.wake()
