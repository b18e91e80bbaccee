"""How a worker runs a task: under a lock of its run's name, removing it from the queue when done.

django-q2's worker loop reads tasks from one queue and writes results to another. With these two in
their place, it runs nothing that another worker runs, and finishes a task when it requests the
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
from orkestr_console.queue.broker import finish, is_current_run
from orkestr_console.queue.driving import driving
from orkestr_console.queue.sockets import SocketQueue

logger = logging.getLogger(__name__)

# A result is stored for people to read; a traceback fits, a runaway message is truncated.
MAX_RESULT_CHARS = 32 * 1024
DATABASE_ERRORS = (DatabaseUnavailable, DatabaseError, InterfaceError, PostgresError)

type Task = dict[str, Any]


class LockedTasks:
    """A worker's view of the task queue: only tasks that it has locked."""

    def __init__(self, queue: SocketQueue) -> None:
        self._queue = queue
        self._run = ""
        self._lock = ExitStack()

    def get(self) -> Task | str:
        """Finish the previous task; the next one to run, or django-q2's ``"STOP"``."""
        self.finish()
        while True:
            task: Task | str = self._queue.get()
            if isinstance(task, str) or self._acquire(task["ack_id"]):
                return task

    def _acquire(self, run: str) -> bool:
        """Lock the task if this is its current run; whether it is."""
        close_old_connections()
        try:
            self._lock.enter_context(driving(run))
            if is_current_run(run):
                self._run = run
                return True
        except DATABASE_ERRORS as error:
            logger.warning("could not lock task %s, it will be dispatched again: %s", run, error)
            connection.close()
        self._lock.close()
        return False

    def finish(self) -> None:
        """Remove the finished task from the queue, retrying while the database is away."""
        if not self._run:
            return
        run, self._run = self._run, ""
        try:
            persistently(lambda: finish(run))
        except DATABASE_ERRORS as error:
            logger.warning("task %s is done but will run again: %s", run, error)
            connection.close()
        finally:
            self._lock.close()


class Results:
    """A worker's view of the result queue."""

    def __init__(self, queue: SocketQueue) -> None:
        self._queue = queue

    def put(self, task: Task) -> None:
        """Pass a task's result to the monitor."""
        # The worker itself deletes the row; the monitor has nothing to acknowledge.
        task.pop("ack_id", None)
        if isinstance(task["result"], str):
            task["result"] = task["result"][:MAX_RESULT_CHARS]
        self._queue.put(task)
