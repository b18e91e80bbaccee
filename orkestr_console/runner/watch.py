"""Detecting hung programs: a program that neither answers a probe nor works is replaced.

The process manager notices a program that has exited, but a stopped one (SIGSTOP) or a deadlocked
one looks alive to it.  So each is probed every few seconds with a request that only it can answer,
in a thread that may be left waiting.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import httpx

from hostruntime.client.host_client import HostClient
from hostruntime.errors import HostError, HostUnavailable
from hostruntime.host.patience import Patience
from orkestr_console.runner.layout import Layout
from orkestr_console.runner.programs import ANSWER_SECONDS

PROBE_SECONDS = 5.0
# How long a program may neither answer nor work. One that works gets ten times that.
HUNG_SECONDS = 30.0

type Probe = Callable[[], bool]
type Pids = Callable[[], Iterable[int]]


class Watch:
    """Watches one program; ``pids`` are the processes whose work counts as a sign of life."""

    def __init__(self, question: Probe, pids: Pids) -> None:
        self._probe = question
        self._pids = pids
        self._probing: threading.Thread | None = None
        self.reset()

    def reset(self) -> None:
        """Reset the patience: it answered, or was restarted."""
        self._patience = Patience(HUNG_SECONDS, self._pids)
        self._next_probe_at = time.monotonic() + PROBE_SECONDS

    def symptom(self) -> str:
        """The symptom of a hung program; empty for any other.

        Call it every second or so; never waits.
        """
        if not self._is_probing() and time.monotonic() >= self._next_probe_at:
            self._probing = threading.Thread(target=self._run_probe, daemon=True)
            self._probing.start()
        return self._patience.reason if self._patience.exhausted() else ""

    def _is_probing(self) -> bool:
        return self._probing is not None and self._probing.is_alive()

    def _run_probe(self) -> None:
        patience = self._patience
        # An answer to a probe of the previous process says nothing about this one.
        if self._probe() and self._patience is patience:
            self.reset()
        else:
            self._next_probe_at = time.monotonic() + PROBE_SECONDS


def web_responds(layout: Layout) -> bool:
    """Whether a web process answers at all."""
    try:
        httpx.get(f"{layout.local_url}/healthz", timeout=ANSWER_SECONDS, trust_env=False)
    except httpx.HTTPError:
        return False
    return True


def agent_responds(socket: Path) -> bool:
    """Whether the host agent answers at all."""
    try:
        with HostClient(socket) as host:
            host.health(seconds=ANSWER_SECONDS)
    except HostUnavailable:
        return False
    except HostError:
        return True
    return True


def is_stopped(pid: int) -> bool:
    """Whether a signal or a tracer has stopped a process."""
    return _state(pid) in {"T", "t"}


def is_running(pid: int) -> bool:
    """Whether a process is running; a zombie is not."""
    return _state(pid) not in {"", "Z", "X"}


def _state(pid: int) -> str:
    """The process's state letter (proc(5)); empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""
