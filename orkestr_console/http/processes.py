"""Several processes that serve one port, and the one that forks and watches them.

::

    manage.py serve         opens the sockets, forks the rest, replaces what dies or is stuck
     └─ web process × n     each with an event loop, threads and database connections of its own

The sockets are opened once and inherited: while one process is replaced, connections wait in the
kernel's queue, from which the others take them, and none is lost. A process that is killed takes
only its own connections with it. SIGTERM is passed on, and each process finishes its requests
(:mod:`orkestr_console.http.daphne`).

No process keeps anything that another would need: rows, sessions and rates are in PostgreSQL,
whose notices reach every process (:mod:`orkestr_console.core.channel_layer`).
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import RawArray

from orkestr_console.core.processes import Heartbeats, die_with, fork

logger = logging.getLogger(__name__)

CHECK_SECONDS = 0.2
# One that dies at once, again and again, is started again no more often.
RESTART_SECONDS = 1.0
# More than a process takes to stop, and less than the process manager waits before it kills.
STOP_SECONDS = 10.0
ABSENT = -1


class Load:
    """How many connections each of some processes has, in shared memory."""

    def __init__(self, processes: int) -> None:
        self._counts = RawArray("l", [ABSENT] * processes)

    def begin(self, index: int) -> None:
        """A process begins to accept connections."""
        self._counts[index] = 0

    def end(self, index: int) -> None:
        """A process accepts no more."""
        self._counts[index] = ABSENT

    def add(self, index: int, number: int) -> None:
        """A process has so many connections more."""
        if self._counts[index] != ABSENT:
            self._counts[index] += number

    def is_ahead(self, index: int) -> bool:
        """Whether another process has fewer connections than this one."""
        return any(0 <= count < self._counts[index] for count in self._counts)


@dataclass(frozen=True)
class Place:
    """What a web process is given: its sockets, its heartbeats, and its share of the load."""

    sockets: Sequence[socket.socket]
    pulse: Heartbeats
    load: Load
    index: int

    @classmethod
    def alone(cls, sockets: Sequence[socket.socket]) -> Place:
        """The place of a process that shares its sockets with nobody."""
        return cls(sockets, Heartbeats(), Load(1), 0)


type Serve = Callable[[Place], None]


@dataclass
class Child:
    """One web process, and the one that takes its place."""

    pulse: Heartbeats = field(default_factory=Heartbeats)
    process: BaseProcess | None = None
    started_at: float = -RESTART_SECONDS


class WebProcesses:
    """Keeps some web processes running until asked to stop."""

    def __init__(self, sockets: Sequence[socket.socket], number: int, serve: Serve) -> None:
        self._sockets = sockets
        self._serve = serve
        self._load = Load(number)
        self._children = [Child() for _ in range(number)]
        self._stopping = False
        self._has_served = False

    def run(self) -> bool:
        """Return after SIGTERM or SIGINT; False if the processes die before any has served."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request_stop)
        # What is there now is never collected, and so stays shared with the children.
        gc.collect()
        gc.freeze()
        try:
            while not self._stopping:
                if not all(self._keep(index) for index in range(len(self._children))):
                    return False
                time.sleep(CHECK_SECONDS)
        finally:
            self._stop()
        return True

    def _request_stop(self, *_: object) -> None:
        self._stopping = True

    def _keep(self, index: int) -> bool:
        """Start one, or replace it if it has exited or is stuck; False to give up."""
        child = self._children[index]
        self._has_served = self._has_served or child.pulse.begun()
        if child.process is not None:
            status, symptom = child.process.exitcode, child.pulse.stuck()
            if status is None and not symptom:
                return True
            problem = f"is stuck, it {symptom}" if status is None else f"has ended ({status})"
            logger.error("a web process %s: starting another", problem)
            self._end(index)
            if not self._has_served:
                return False
        if time.monotonic() - child.started_at >= RESTART_SECONDS:
            child.pulse, child.started_at = Heartbeats(), time.monotonic()
            place = Place(self._sockets, child.pulse, self._load, index)
            child.process = fork.Process(target=self._run_child, args=(os.getpid(), place))
            child.process.start()
        return True

    def _run_child(self, parent: int, place: Place) -> None:
        die_with(parent)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        self._serve(place)

    def _end(self, index: int) -> None:
        process = self._children[index].process
        if process is not None:
            process.kill()
            process.join()
        self._children[index].process = None
        self._load.end(index)

    def _stop(self) -> None:
        """Accept nothing more, let each finish its requests, and kill those that do not."""
        for each in self._sockets:
            each.close()
        running = [child.process for child in self._children if child.process is not None]
        for process in running:
            process.terminate()
        until = time.monotonic() + STOP_SECONDS
        for process in running:
            process.join(max(0.0, until - time.monotonic()))
        for index in range(len(self._children)):
            self._end(index)
