"""`manage.py worker`: run the task queue's workers until SIGTERM."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand


class Command(BaseCommand):
    """Run the task queue's workers in the foreground, restarted as a group if they hang."""

    help = "Run builds, expiry and other tasks from the queue until SIGTERM."

    def handle(self, *args: Any, **options: Any) -> None:
        """Work; returns after SIGTERM."""
        # Here, because django-q2 takes its settings when it is imported.
        from orkestr_console.queue.worker import run_worker

        run_worker()
