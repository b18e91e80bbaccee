"""What a person is told when a backup or a restore cannot be made."""

from __future__ import annotations


class BackupError(Exception):
    """It cannot be done; the message says what was wrong and what to do."""
