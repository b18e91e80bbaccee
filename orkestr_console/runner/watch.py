"""Hung is not dead: a program that is asked something and neither answers nor works is replaced.

The process manager sees a program that has ended, but a stopped one (SIGSTOP), or one whose every
thread waits for another, runs on for it.  So each is asked a question it can answer only itself,
every few seconds, in a thread that may be left waiting.
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

ASK_SECONDS = 5.0
# In which a program neither answers nor works. One that is at work gets ten times that.
HUNG_SECONDS = 30.0

type Question = Callable[[], bool]
type Pids = Callable[[], Iterable[int]]


class Watched:
    """One program's answers; ``pids`` are the processes whose work counts as life."""

    def __init__(self, question: Question, pids: Pids) -> None:
        self._question = question
        self._pids = pids
        self._asking: threading.Thread | None = None
        self.begin()

    def begin(self) -> None:
        """Have patience anew: it answered, or was started."""
        self._patience = Patience(HUNG_SECONDS, self._pids)
        self._ask_at = time.monotonic() + ASK_SECONDS

    def hung(self) -> str:
        """What is seen of a program that gives no sign of life any more; empty for any other.

        To be called every second or so; never waits.
        """
        if not self._is_asking() and time.monotonic() >= self._ask_at:
            self._asking = threading.Thread(target=self._ask, daemon=True)
            self._asking.start()
        return self._patience.reason if self._patience.exhausted() else ""

    def _is_asking(self) -> bool:
        return self._asking is not None and self._asking.is_alive()

    def _ask(self) -> None:
        asked = self._patience
        # An answer to what the process before it was asked says nothing of this one.
        if self._question() and self._patience is asked:
            self.begin()
        else:
            self._ask_at = time.monotonic() + ASK_SECONDS


def web_responds(layout: Layout) -> bool:
    """Whether the web process says anything at all."""
    try:
        httpx.get(f"{layout.local_url}/healthz", timeout=ANSWER_SECONDS, trust_env=False)
    except httpx.HTTPError:
        return False
    return True


def agent_responds(socket: Path) -> bool:
    """Whether the host agent says anything at all."""
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
    """Whether a process has not ended yet; one that only waits to be collected has."""
    return _state(pid) not in {"", "Z", "X"}


def _state(pid: int) -> str:
    """The letter of proc(5); nothing where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""
