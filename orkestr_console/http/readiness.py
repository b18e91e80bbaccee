"""Whether everything that a request may need answers: looked at all the time, told at once.

Each thing is looked at by a thread of its own, which may hang for as long as what it looks at does.
Whoever asks reads what was seen last and how old that is, and waits for nothing: a thing that does
not answer is one whose last good answer grows old.

``database``  a statement through the pool that requests use
``worker``    the queue's pusher comes round, as the database sees it
``agent``     the host agent answers
``proxy``     the agent finds the egress proxy well
``disk``      the installation's reserve is there, by the agent's measure
(:mod:`hostruntime.host.disk_space`):
              below it nothing new is begun
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from django.conf import settings
from django.db import connection

from hostruntime import errors as host_errors
from hostruntime.client.host_client import host_client
from hostruntime.host.disk_space import DiskSpace, Level
from hostruntime.host.patience import scaled
from orkestr_console.core.postgres import unavailable

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
MIB = 1024 * 1024
# A look that takes longer is no answer; nor is one that is so old.
SILENT_SECONDS = scaled(4.0)
AGENT_SECONDS = 3.0
# The pusher comes round at least every second (broker.POLL_SECONDS).
WORKER_SECONDS = scaled(10.0)
PUSHER = """
SELECT extract(epoch FROM clock_timestamp() - max(query_start))::float8
FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'orkestr queue'
"""

type State = Literal["ok", "failing", "silent", "unknown"]
# What is wrong with each thing that was looked at; None for nothing.
type Findings = dict[str, str | None]


@dataclass(frozen=True)
class Check:
    """One thing: its state, the seconds since it was last well, and what is wrong with it."""

    state: State
    age_seconds: float | None
    detail: str | None = None

    def to_wire(self) -> dict[str, Any]:
        """The JSON object."""
        age = None if self.age_seconds is None else round(self.age_seconds, 1)
        wire: dict[str, Any] = {"state": self.state, "age_seconds": age}
        return wire if self.detail is None else {**wire, "detail": self.detail}


@dataclass
class Look:
    """Something that is looked at again and again in a thread, and what was seen last."""

    names: tuple[str, ...]
    look: Callable[[], Findings]
    _began: float | None = None
    _found: Findings = field(default_factory=dict)
    _well: dict[str, float] = field(default_factory=dict)

    def go_on(self) -> None:
        """Look for ever. What a look raises is told of all its things, in one sentence of ours."""
        while True:
            self.once()
            time.sleep(LOOK_SECONDS)

    def once(self) -> None:
        """Look once."""
        self._began = time.monotonic()
        try:
            found = self.look()
        except Exception:
            logger.exception("could not look at %s", ", ".join(self.names))
            found = dict.fromkeys(self.names, "could not be looked at; the log says why")
        now = time.monotonic()
        self._well |= {name: now for name, wrong in found.items() if wrong is None}
        self._found, self._began = found, None

    def checks(self) -> dict[str, Check]:
        """Each of its things as it was seen last."""
        now, began, found = time.monotonic(), self._began, self._found
        silent = began is not None and now - began > SILENT_SECONDS
        return {name: self._check(name, found, now, silent=silent) for name in self.names}

    def _check(self, name: str, found: Findings, now: float, *, silent: bool) -> Check:
        well = self._well.get(name)
        age = None if well is None else now - well
        if silent:
            return Check("silent", age, "does not answer")
        if name not in found:
            return Check("unknown", age, "was not looked at yet")
        wrong = found[name]
        return Check("ok", age) if wrong is None else Check("failing", age, wrong)


def look_at_database() -> Findings:
    """Through the pool, as any request; and from there at the worker."""
    try:
        with connection.cursor() as cursor:
            cursor.execute(PUSHER)
            row = cursor.fetchone()
        return {"database": None, "worker": worker_of(row[0] if row else None)}
    except Exception as error:
        if unavailable(error) is None:
            raise
        away = "cannot be reached, or has no connection free"
        return {"database": away, "worker": "is not known while the database is away"}
    finally:
        connection.close()


def worker_of(seconds: float | None) -> str | None:
    """What is wrong with a worker that came round so long ago, by the database's clock."""
    if seconds is None:
        return "does not run"
    return None if seconds < WORKER_SECONDS else "does not take tasks"


def look_at_agent() -> Findings:
    """One question; what the agent knows of the proxy comes with the answer."""
    try:
        health = host_client(settings.HOST_SOCKET).health(seconds=AGENT_SECONDS)
    except host_errors.HostError:
        return {"agent": "does not answer", "proxy": "is not known while the agent is away"}
    return {"agent": None, "proxy": None if health.proxy.get("healthy") else "does not run"}


def look_at_disk() -> Findings:
    """Room for bytes and files, and that they may be written."""
    wrong = [room_at(path) for path in (settings.VAR, settings.HOST_STATE_DIR)]
    return {"disk": next((one for one in wrong if one is not None), None)}


def room_at(path: Path) -> str | None:
    """What is wrong with the file system that ``path`` is on, as far as we may look."""
    while not os.access(path, os.X_OK) and path != path.parent:
        path = path.parent
    room = DiskSpace.of(path)
    if room.read_only:
        return "cannot be written to"
    if room.level is Level.NORMAL:
        return None
    left = f"{max(room.free_bytes, 0) // MIB} MiB and {room.free_files} inodes"
    kept = f"{room.reserve_bytes // MIB} MiB and {room.reserve_files} inodes"
    return f"is short of room: {left} are free, {kept} are reserved"


@dataclass
class Readiness:
    """All that is looked at."""

    looks: tuple[Look, ...]
    _guard: threading.Lock = field(default_factory=threading.Lock)
    _looking: bool = False

    def start(self) -> None:
        """Begin to look, once a process."""
        with self._guard:
            if self._looking:
                return
            self._looking = True
        for look in self.looks:
            name = f"look at {', '.join(look.names)}"
            threading.Thread(target=look.go_on, name=name, daemon=True).start()

    def checks(self) -> dict[str, Check]:
        """What was seen of each thing last; waits for nothing."""
        return {name: check for look in self.looks for name, check in look.checks().items()}


def is_ready(checks: Mapping[str, Check]) -> bool:
    """Whether all is well."""
    return all(check.state == "ok" for check in checks.values())


readiness = Readiness(
    (
        Look(("database", "worker"), look_at_database),
        Look(("agent", "proxy"), look_at_agent),
        Look(("disk",), look_at_disk),
    )
)
