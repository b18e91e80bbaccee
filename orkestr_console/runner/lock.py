"""A lock that allows one `manage.py up` per var directory."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from orkestr_console.runner.layout import Layout, StartError


@contextmanager
def exclusive_lock(layout: Layout) -> Iterator[None]:
    """Hold the installation's lock (flock(2): the kernel releases it however we exit).

    Raises ``StartError`` if another process holds it.
    """
    with layout.lock.open("a+") as stream:
        # Anybody who can open it, even only to read, could lock it against us (flock(2)).
        layout.lock.chmod(0o600)
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartError(_already_running(layout)) from None
        stream.truncate(0)
        stream.write(f"{os.getpid()}\n")
        stream.flush()
        yield


def lock_holder(layout: Layout) -> int | None:
    """The process id of the running `up`, or None."""
    if not layout.lock.exists():
        return None
    with layout.lock.open() as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = stream.read().strip()
            return int(text) if text.isdecimal() else None
    return None


def _already_running(layout: Layout) -> str:
    url = layout.ready.read_text().strip() if layout.ready.exists() else "and still starting"
    return (
        f"it already runs: process {lock_holder(layout) or '?'}, {url}. Use that one, stop it with "
        "Ctrl-C or `make down`, or start a second installation with ORKESTR_VAR=… and PORT=…"
    )
