"""How a worker runs a task: under a lock of that run's name, and off the queue once it is done.

django-q2's worker loop takes tasks from one queue and puts results on another. Given these two in
their place, it runs nothing that another worker runs, and lets go of a task when it asks for the
next.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import Any

from django.db import DatabaseError, InterfaceError, close_old_connections, connection
from psycopg import Error as PostgresError

from orkestr_console.core.errors import DatabaseUnavailable
from orkestr_console.core.postgres import persistently
from orkestr_console.queue.broker import finish, is_given
from orkestr_console.queue.driving import driving
from orkestr_console.queue.sockets import SocketQueue

logger = logging.getLogger(__name__)

# A result is kept for people to look at; a traceback fits, a runaway message is cut.
LONGEST_RESULT = 32 * 1024
AWAY = (DatabaseUnavailable, DatabaseError, InterfaceError, PostgresError)

type Task = dict[str, Any]


class HeldTasks:
    """The queue of tasks as a worker sees it: those that are its own to run."""

    def __init__(self, queue: SocketQueue) -> None:
        self._queue = queue
        self._run = ""
        self._lock = ExitStack()

    def get(self) -> Task | str:
        """The next task to run, or django-q2's ``"STOP"``; the one before is done."""
        self.finish()
        while True:
            task: Task | str = self._queue.get()
            if isinstance(task, str) or self._begin(task["ack_id"]):
                return task

    def _begin(self, run: str) -> bool:
        """Whether the task is ours to run; if so its lock is held from now on."""
        close_old_connections()
        try:
            self._lock.enter_context(driving(run))
            if is_given(run):
                self._run = run
                return True
        except AWAY as error:
            logger.warning("task %s is left to come back: %s", run, error)
            connection.close()
        self._lock.close()
        return False

    def finish(self) -> None:
        """Take the task that was run off the queue, however long the database is away."""
        if not self._run:
            return
        run, self._run = self._run, ""
        try:
            persistently(lambda: finish(run))
        except AWAY as error:
            logger.warning("task %s is done, and runs again: %s", run, error)
            connection.close()
        finally:
            self._lock.close()


class Results:
    """The queue of results as a worker sees it."""

    def __init__(self, queue: SocketQueue) -> None:
        self._queue = queue

    def put(self, task: Task) -> None:
        """Pass what became of a task to the monitor."""
        # The row is the worker's own to delete; the monitor has nothing to acknowledge.
        task.pop("ack_id", None)
        if isinstance(task["result"], str):
            task["result"] = task["result"][:LONGEST_RESULT]
        self._queue.put(task)
