"""`manage.py serve`: the web process, serving console, REST and WebSockets until SIGTERM."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser


class Command(BaseCommand):
    """Run the web process in the foreground."""

    help = "Serve console, REST and WebSockets until SIGTERM."

    def add_arguments(self, parser: CommandParser) -> None:
        """Where to listen."""
        parser.add_argument("--port", type=int, default=settings.PORT)
        parser.add_argument(
            "--address",
            action="append",
            help="listen on this address (may be repeated); ORKESTR_LISTEN's if not given",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        """Serve; never returns."""
        # Here, because it installs an event loop that no other command wants.
        from orkestr_console.asgi import application
        from orkestr_console.server import build_server, leave

        server = build_server(application, options["address"] or settings.LISTEN, options["port"])
        server.run()
        if server.failure:
            raise CommandError(f"cannot listen on port {options['port']}: {server.failure}")
        leave(0)
