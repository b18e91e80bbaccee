"""Child processes that are forked, watched, and never left behind."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from multiprocessing.sharedctypes import RawArray

from django.conf import settings

from hostruntime.host.patience import Patience

PR_SET_PDEATHSIG = 1
# How long a process may be silent and idle before it counts as stuck.
STALE_SECONDS = settings.WORKER_STALE_SECONDS

fork = multiprocessing.get_context("fork")


def die_with(parent: int) -> None:
    """Have the kernel kill this process when process ``parent``, which forked it, ends.

    PR_SET_PDEATHSIG, prctl(2).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        # The parent exited before the call.
        os._exit(1)


class Heartbeats:
    """Heartbeat counters of some processes, in shared memory.

    Nobody locks it, so a killed process cannot block another.
    """

    def __init__(self, processes: int = 1) -> None:
        self._beats = RawArray("L", processes)
        self._pids = RawArray("L", processes)
        # The counts that the watchdog last saw, and its patience for more.
        self._seen = [0] * processes
        self._patience = [self._new_patience(index) for index in range(processes)]

    def beat(self, index: int = 0) -> None:
        """Record that the calling process is alive."""
        self._beats[index] += 1
        self._pids[index] = os.getpid()

    def begun(self, index: int = 0) -> bool:
        """Whether there has been a heartbeat."""
        return bool(self._beats[index])

    def stuck(self) -> str:
        """The symptom of a process without heartbeats that does nothing else either, or ``""``."""
        for index in range(len(self._seen)):
            if self._beats[index] != self._seen[index]:
                self._seen[index] = self._beats[index]
                self._patience[index] = self._new_patience(index)
            elif self._patience[index].exhausted():
                return self._patience[index].reason
        return ""

    def _new_patience(self, index: int) -> Patience:
        return Patience(STALE_SECONDS, lambda: [pid for pid in [self._pids[index]] if pid])
