"""Rows on their way from one state to the next, and whether the process that drives them lives.

To start a sandbox from a large snapshot, or to take one, takes as long as the host's disk needs.
So what is on its way is judged by its driver, never by its age: for as long as the call to the host
lasts the driver says every few seconds that it lives (``driven_at``), and what nobody has driven
for :data:`SILENCE` was left by a process that was killed.  A call to the host that hangs is the
host's own to end (:mod:`hostruntime.patience`).
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta

from django.db import connection
from django.utils import timezone

from hostruntime.patience import scaled
from sandboxes_app.models import Sandbox, Snapshot

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 10.0
SILENCE = timedelta(seconds=scaled(120))

type Row = Sandbox | Snapshot


class Drivers:
    """The rows that this process drives, and the thread that says so while there are any."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._rows: Counter[tuple[type[Row], str]] = Counter()
        self._beating = False

    @contextmanager
    def driving(self, row: Row) -> Iterator[None]:
        """Say that ``row`` is driven, for as long as this lasts."""
        key = (type(row), row.pk)
        with self._guard:
            self._rows[key] += 1
            if not self._beating:
                threading.Thread(target=self._run, name="drivers", daemon=True).start()
                self._beating = True
        try:
            yield
        finally:
            with self._guard:
                self._rows[key] -= 1
                self._rows += Counter()  # Without those that are driven no more.

    def _run(self) -> None:
        pause = threading.Event()
        while True:
            pause.wait(HEARTBEAT_SECONDS)
            with self._guard:
                rows = list(self._rows)
                self._beating = bool(rows)
            if not rows:
                return
            self._beat(rows)

    def _beat(self, rows: list[tuple[type[Row], str]]) -> None:
        try:
            for model in (Sandbox, Snapshot):
                driven = [pk for kind, pk in rows if kind is model]
                if driven:
                    model.objects.filter(pk__in=driven).update(driven_at=timezone.now())
        except Exception:
            # The database being away for a moment is no reason to stop.
            logger.warning("could not say what is driven", exc_info=True)
        finally:
            connection.close()


driving = Drivers().driving


def left_alone(row: Row, since: datetime) -> bool:
    """Whether nobody has driven ``row``, which is on its way ``since`` then, for too long."""
    last = max(since, row.driven_at) if row.driven_at else since
    return last < timezone.now() - SILENCE
