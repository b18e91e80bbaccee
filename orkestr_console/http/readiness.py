"""Readiness of a request's dependencies: probed continuously, reported without waiting.

Each probe runs in its own thread, which may hang as long as its dependency does. Readers get the
last result and its age, and wait for nothing: a dependency that doesn't answer has an ageing
result.

``database``  a statement through the pool that requests use
``worker``    the queue's pusher is polling, as the database sees it
``agent``     the host agent answers
``proxy``     the agent reports the egress proxy as healthy
``disk``      the installation's reserve is free, by the agent's measure
(:mod:`hostruntime.host.disk_space`):
              below it nothing new is started
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

PROBE_SECONDS = 1.0
MIB = 1024 * 1024
# A probe that takes longer counts as silent.
PROBE_TIMEOUT = scaled(4.0)
AGENT_TIMEOUT = 3.0
# The pusher polls at least every second (broker.POLL_SECONDS).
WORKER_TIMEOUT = scaled(10.0)
PUSHER_AGE_SQL = """
SELECT extract(epoch FROM clock_timestamp() - max(query_start))::float8
FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'orkestr queue'
"""

type State = Literal["ok", "failing", "silent", "unknown"]
# The problem of each probed dependency; None if it is ok.
type Findings = dict[str, str | None]


@dataclass(frozen=True)
class Check:
    """One dependency: its state, the seconds since it was last ok, and its problem."""

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
    """A check that a thread repeats, and its last result."""

    names: tuple[str, ...]
    probe: Callable[[], Findings]
    _started_at: float | None = None
    _findings: Findings = field(default_factory=dict)
    _last_ok: dict[str, float] = field(default_factory=dict)

    def run_forever(self) -> None:
        """Probe for ever. An exception counts as a problem of all its dependencies."""
        while True:
            self.run_once()
            time.sleep(PROBE_SECONDS)

    def run_once(self) -> None:
        """Probe once."""
        self._started_at = time.monotonic()
        try:
            findings = self.probe()
        except Exception:
            logger.exception("could not check %s", ", ".join(self.names))
            findings = dict.fromkeys(self.names, "could not be checked; the log says why")
        now = time.monotonic()
        self._last_ok |= {name: now for name, problem in findings.items() if problem is None}
        self._findings, self._started_at = findings, None

    def checks(self) -> dict[str, Check]:
        """The last result of each of its dependencies."""
        now, started_at, findings = time.monotonic(), self._started_at, self._findings
        silent = started_at is not None and now - started_at > PROBE_TIMEOUT
        return {name: self._check(name, findings, now, silent=silent) for name in self.names}

    def _check(self, name: str, findings: Findings, now: float, *, silent: bool) -> Check:
        last_ok = self._last_ok.get(name)
        age = None if last_ok is None else now - last_ok
        if silent:
            return Check("silent", age, "does not answer")
        if name not in findings:
            return Check("unknown", age, "was not checked yet")
        problem = findings[name]
        return Check("ok", age) if problem is None else Check("failing", age, problem)


def probe_database() -> Findings:
    """Query through the pool, as any request does; and through it check the worker."""
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
    """The problem of a worker whose pusher last polled so many ``seconds`` ago, if any."""
    if seconds is None:
        return "does not run"
    return None if seconds < WORKER_TIMEOUT else "does not take tasks"


def probe_agent() -> Findings:
    """One request; its answer includes the proxy's health."""
    try:
        health = host_client(settings.HOST_SOCKET).health(seconds=AGENT_TIMEOUT)
    except host_errors.HostError:
        return {"agent": "does not answer", "proxy": "is not known while the agent is away"}
    return {"agent": None, "proxy": None if health.proxy.get("healthy") else "does not run"}


def probe_disk() -> Findings:
    """Check free bytes and inodes, and that the disk is writable."""
    problems = [disk_problem(path) for path in (settings.VAR, settings.HOST_STATE_DIR)]
    return {"disk": next((problem for problem in problems if problem is not None), None)}


def disk_problem(path: Path) -> str | None:
    """The problem of the file system that ``path`` is on, as far as we can see."""
    while not os.access(path, os.X_OK) and path != path.parent:
        path = path.parent
    room = DiskSpace.of(path)
    if room.read_only:
        return "cannot be written to"
    if room.level is Level.NORMAL:
        return None
    free = f"{max(room.free_bytes, 0) // MIB} MiB and {room.free_files} inodes"
    reserved = f"{room.reserve_bytes // MIB} MiB and {room.reserve_files} inodes"
    return f"is short of room: {free} are free, {reserved} are reserved"


@dataclass
class Readiness:
    """All probes."""

    probes: tuple[Probe, ...]
    _guard: threading.Lock = field(default_factory=threading.Lock)
    _started: bool = False

    def start(self) -> None:
        """Start the probes' threads, once per process."""
        with self._guard:
            if self._started:
                return
            self._started = True
        for probe in self.probes:
            name = f"look at {', '.join(probe.names)}"
            threading.Thread(target=probe.run_forever, name=name, daemon=True).start()

    def checks(self) -> dict[str, Check]:
        """The last result of each dependency; waits for nothing."""
        return {name: check for probe in self.probes for name, check in probe.checks().items()}


def is_ready(checks: Mapping[str, Check]) -> bool:
    """Whether all checks are ok."""
    return all(check.state == "ok" for check in checks.values())


readiness = Readiness(
    (
        Probe(("database", "worker"), probe_database),
        Probe(("agent", "proxy"), probe_agent),
        Probe(("disk",), probe_disk),
    )
)
