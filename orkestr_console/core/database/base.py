"""The backend's module that Django loads (``ENGINE``).

psycopg's pool gives up on whoever has waited for its ``timeout``, so a short one, which a database
that is away calls for, sends callers away in a burst as well. Here ``timeout`` is how long nobody
at all may have been served (:class:`~orkestr_console.core.database.queueing.Queue`), and the pool
itself is only ever asked for as many connections as it has.
"""

from __future__ import annotations

from typing import Any, ClassVar

from django.db.backends.postgresql import base
from psycopg_pool import PoolTimeout

from orkestr_console.core.database.queueing import Queue

# The longest wait in a burst, in units of ``timeout``: clients give up after half a minute.
MAX_WAIT = 10


class DatabaseWrapper(base.DatabaseWrapper):
    """A thread's connection, which it waits for in a queue."""

    _queues: ClassVar[dict[Any, Queue]] = {}
    _place: Queue | None = None

    def get_new_connection(self, conn_params: dict[str, Any]) -> Any:
        """A connection, from the pool if there is one. Raises ``PoolTimeout``."""
        pool = self.pool
        if not pool:
            return super().get_new_connection(conn_params)
        queue = self._queues.get(pool)
        if queue is None:
            made = Queue(pool.max_size, pool.timeout, pool.timeout * MAX_WAIT)
            queue = self._queues.setdefault(pool, made)
        if not queue.enter():
            raise PoolTimeout(f"no connection became free in {pool.timeout:.2f} s")
        try:
            connection = super().get_new_connection(conn_params)
        except BaseException:
            queue.leave(served=False)
            raise
        self._place = queue
        return connection

    def close_pool(self) -> None:
        """Close the pool, and forget its queue."""
        self._queues.pop(self.pool, None)
        super().close_pool()

    def _close(self) -> None:
        try:
            super()._close()  # type: ignore[misc]
        finally:
            place, self._place = self._place, None
            if place is not None:
                place.leave(served=True)
