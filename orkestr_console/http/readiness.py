"""Whether everything that a request may need answers: looked at all the time, told at once.

Each thing is looked at by a thread of its own, which may hang for as long as what it looks at does.
Whoever asks reads what was seen last and how old that is, and waits for nothing: a thing that does
not answer is one whose last good answer grows old.

``database``  a statement through the pool that requests use
``worker``    the queue's pusher comes round, as the database sees it
``agent``     the host agent answers
``proxy``     the agent finds the egress proxy well
``disk``      the installation's reserve is there, by the agent's measure
(:mod:`hostruntime.host.room`):
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
from hostruntime.host.patience import scaled
from hostruntime.host.room import Level, Room
from orkestr_console.core.postgres import unavailable

logger = logging.getLogger(__name__)

PROBE_SECONDS = 1.0
MIB = 1024 * 1024
# A look that takes longer is no answer; nor is one that is so old.
PROBE_TIMEOUT = scaled(4.0)
AGENT_TIMEOUT = 3.0
# The pusher comes round at least every second (broker.POLL_SECONDS).
WORKER_TIMEOUT = scaled(10.0)
PUSHER_AGE_SQL = """
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
class Probe:
    """Something that is looked at again and again in a thread, and what was seen last."""

    names: tuple[str, ...]
    probe: Callable[[], Findings]
    _started_at: float | None = None
    _findings: Findings = field(default_factory=dict)
    _last_ok: dict[str, float] = field(default_factory=dict)

    def run_forever(self) -> None:
        """Look for ever. What a look raises is told of all its things, in one sentence of ours."""
        while True:
            self.run_once()
            time.sleep(PROBE_SECONDS)

    def run_once(self) -> None:
        """Look once."""
        self._started_at = time.monotonic()
        try:
            findings = self.probe()
        except Exception:
            logger.exception("could not look at %s", ", ".join(self.names))
            findings = dict.fromkeys(self.names, "could not be looked at; the log says why")
        now = time.monotonic()
        self._last_ok |= {name: now for name, problem in findings.items() if problem is None}
        self._findings, self._started_at = findings, None

    def checks(self) -> dict[str, Check]:
        """Each of its things as it was seen last."""
        now, started_at, findings = time.monotonic(), self._started_at, self._findings
        silent = started_at is not None and now - started_at > PROBE_TIMEOUT
        return {name: self._check(name, findings, now, silent=silent) for name in self.names}

    def _check(self, name: str, findings: Findings, now: float, *, silent: bool) -> Check:
        last_ok = self._last_ok.get(name)
        age = None if last_ok is None else now - last_ok
        if silent:
            return Check("silent", age, "does not answer")
        if name not in findings:
            return Check("unknown", age, "was not looked at yet")
        problem = findings[name]
        return Check("ok", age) if problem is None else Check("failing", age, problem)


def probe_database() -> Findings:
    """Through the pool, as any request; and from there at the worker."""
    try:
        with connection.cursor() as cursor:
            cursor.execute(PUSHER_AGE_SQL)
            row = cursor.fetchone()
        return {"database": None, "worker": worker_problem(row[0] if row else None)}
    except Exception as error:
        if unavailable(error) is None:
            raise
        away = "cannot be reached, or has no connection free"
        return {"database": away, "worker": "is not known while the database is away"}
    finally:
        connection.close()


def worker_problem(seconds: float | None) -> str | None:
    """What is wrong with a worker that came round so long ago, by the database's clock."""
    if seconds is None:
        return "does not run"
    return None if seconds < WORKER_TIMEOUT else "does not take tasks"


def probe_agent() -> Findings:
    """One question; what the agent knows of the proxy comes with the answer."""
    try:
        health = host_client(settings.HOST_SOCKET).health(seconds=AGENT_TIMEOUT)
    except host_errors.HostError:
        return {"agent": "does not answer", "proxy": "is not known while the agent is away"}
    return {"agent": None, "proxy": None if health.proxy.get("healthy") else "does not run"}


def probe_disk() -> Findings:
    """Room for bytes and files, and that they may be written."""
    problems = [disk_problem(path) for path in (settings.VAR, settings.HOST_STATE_DIR)]
    return {"disk": next((problem for problem in problems if problem is not None), None)}


def disk_problem(path: Path) -> str | None:
    """What is wrong with the file system that ``path`` is on, as far as we may look."""
    while not os.access(path, os.X_OK) and path != path.parent:
        path = path.parent
    room = Room.of(path)
    if room.read_only:
        return "cannot be written to"
    if room.level is Level.WELL:
        return None
    free = f"{max(room.free_bytes, 0) // MIB} MiB and {room.free_files} inodes"
    reserved = f"{room.reserve_bytes // MIB} MiB and {room.reserve_files} inodes"
    return f"is short of room: {free} are free, {reserved} are reserved"


@dataclass
class Readiness:
    """All that is looked at."""

    probes: tuple[Probe, ...]
    _guard: threading.Lock = field(default_factory=threading.Lock)
    _started: bool = False

    def start(self) -> None:
        """Begin to look, once a process."""
        with self._guard:
            if self._started:
                return
            self._started = True
        for probe in self.probes:
            name = f"look at {', '.join(probe.names)}"
            threading.Thread(target=probe.run_forever, name=name, daemon=True).start()

    def checks(self) -> dict[str, Check]:
        """What was seen of each thing last; waits for nothing."""
        return {name: check for probe in self.probes for name, check in probe.checks().items()}


def is_ready(checks: Mapping[str, Check]) -> bool:
    """Whether all is well."""
    return all(check.state == "ok" for check in checks.values())


readiness = Readiness(
    (
        Probe(("database", "worker"), probe_database),
        Probe(("agent", "proxy"), probe_agent),
        Probe(("disk",), probe_disk),
    )
)
