"""How a worker keeps the lease on the task it runs: a thread that renews it, and queues around it.

django-q2's worker loop takes tasks from one queue and puts results on another. Given these two in
their place, it runs nothing it has no lease on, and lets go of a task the moment it is done.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from typing import Any

import psycopg

from orkestr_console.queue.broker import HEARTBEAT_SECONDS, Connection, Lease, connect
from orkestr_console.queue.sockets import SocketQueue

logger = logging.getLogger(__name__)

STOP = "STOP"
# A result is kept for people to look at; a traceback fits, a runaway message is cut.
LONGEST_RESULT = 32 * 1024

type Task = dict[str, Any]


class LeaseKeeper:
    """Renews the running task's lease from a thread of its own, on a connection of its own."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._wake = threading.Event()
        self._queue: Connection | None = None
        self._current: Lease | None = None
        self._finished: list[Lease] = []
        threading.Thread(target=self._run, name="leases", daemon=True).start()

    def take(self, lease: Lease) -> bool:
        """Whether the task is still ours to run; if so its lease is kept from now on."""
        with self._guard:
            try:
                self._current = lease.renewed(self._connection())
            except psycopg.Error as error:
                logger.warning("task %d is left to come back: %s", lease.task, error)
                self._let_go()
            return self._current is not None

    def finish(self) -> None:
        """The running task is done. Returns at once; the row goes as soon as PostgreSQL answers."""
        with self._guard:
            if self._current is not None:
                self._finished.append(self._current)
                self._current = None
        self._wake.set()

    def _run(self) -> None:
        while True:
            self._wake.wait(HEARTBEAT_SECONDS)
            self._wake.clear()
            with self._guard:
                try:
                    self._beat()
                except psycopg.Error as error:
                    logger.warning("leases are not renewed, trying again: %s", error)
                    self._let_go()

    def _beat(self) -> None:
        while self._finished:
            self._finished[0].finish(self._connection())
            self._finished.pop(0)
        if self._current is not None:
            renewed = self._current.renewed(self._connection())
            if renewed is None:
                # Another worker has it by now. Two must not run it, and it cannot be interrupted.
                logger.critical("the lease on task %d is lost: ending", self._current.task)
                os.kill(os.getpid(), signal.SIGKILL)
            self._current = renewed

    def _connection(self) -> Connection:
        if self._queue is None:
            self._queue = connect("lease")
        return self._queue

    def _let_go(self) -> None:
        if self._queue is not None:
            self._queue.close()
            self._queue = None


class LeasedTasks:
    """The queue of tasks as a worker sees it: only those whose lease still holds."""

    def __init__(self, queue: SocketQueue, keeper: LeaseKeeper) -> None:
        self._queue = queue
        self._keeper = keeper

    def get(self) -> Task | str:
        """The next task to run, or ``STOP``."""
        while True:
            task: Task | str = self._queue.get()
            if isinstance(task, str):
                return task
            if self._keeper.take(Lease.parse(task["ack_id"])):
                return task


class LeasedResults:
    """The queue of results as a worker sees it: a result means that the task is done."""

    def __init__(self, queue: SocketQueue, keeper: LeaseKeeper) -> None:
        self._queue = queue
        self._keeper = keeper

    def put(self, task: Task) -> None:
        """Let go of the task, and pass what became of it to the monitor."""
        self._keeper.finish()
        # The row is gone or going; the monitor has nothing to acknowledge.
        task.pop("ack_id", None)
        if isinstance(task["result"], str):
            task["result"] = task["result"][:LONGEST_RESULT]
        self._queue.put(task)
