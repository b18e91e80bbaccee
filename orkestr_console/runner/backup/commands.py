"""Shared by the commands `backup` and `restore`: progress reports, and readable errors."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psycopg
from django.core.management.base import CommandError, OutputWrapper

from hostruntime.errors import HostError
from hostruntime.host.progress import Progress
from orkestr_console.runner.backup.errors import BackupError
from orkestr_console.runner.layout import StartError
from orkestr_console.runner.postgres import PostgresError

REPORT_SECONDS = 5
_MIB = 1024 * 1024
# Errors of file systems without owners, attributes or hard links.
_UNSUPPORTED_ERRNOS = frozenset({errno.EOPNOTSUPP, errno.EPERM, errno.EMLINK})


class ProgressReporter:
    """Reports each phase, and the progress every few seconds."""

    def __init__(self, stream: OutputWrapper) -> None:
        self._stream = stream
        self._next = time.monotonic() + REPORT_SECONDS
        self.progress = Progress()

    def report(self, text: str) -> None:
        """Report the next phase."""
        self._stream.write(f"  {text}")

    def on_progress(self) -> None:
        """Called between the pieces of the work."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + REPORT_SECONDS
            self.report(f"… {self.progress.bytes / _MIB:.0f} MiB, with what is holes in files")


@contextmanager
def command_errors(operation: str, directory: Path) -> Iterator[None]:
    """Require root and a private umask; turn errors and interrupts into messages.

    Raises CommandError.
    """
    if os.geteuid() != 0:
        raise CommandError(
            f"only root may read what a {operation} is of: say `sudo ./manage.py {operation}`"
        )
    os.umask(0o022)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    except KeyboardInterrupt:
        raise CommandError(f"stopped; the {operation} is not whole. Repeat it to go on") from None
    except (BackupError, StartError, PostgresError, HostError, psycopg.Error) as error:
        raise CommandError(f"no {operation} was made: {str(error).strip()}") from error
    except OSError as error:
        raise CommandError(
            f"no {operation} was made: {_os_error_text(error, directory)}"
        ) from error


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _os_error_text(error: OSError, directory: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full. Nothing half done counts; make room and repeat it, and it goes on"
    if error.errno in _UNSUPPORTED_ERRNOS:
        return (
            f"{error}. The file system of {directory} must keep owners, attributes and hard links, "
            "as ext4, xfs and btrfs do"
        )
    return str(error)
