"""`manage.py serve`: the web process, serving console, REST and WebSockets until SIGTERM."""

from __future__ import annotations

import resource
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import connections

from orkestr_console.core.postgres import RequestConnection, check_connection


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
        use_request_settings()
        # Here, because it installs an event loop that no other command wants.
        from orkestr_console.asgi import application
        from orkestr_console.http.daphne import build_server, exit_process
        from orkestr_console.http.readiness import readiness

        readiness.start()
        server = build_server(application, options["address"] or settings.LISTEN, options["port"])
        server.run()
        if server.failure:
            raise CommandError(f"cannot listen on port {options['port']}: {server.failure}")
        exit_process(0)


def use_request_settings() -> None:
    """Configure the process for requests, before there is a pool or a connection.

    Whoever waits is told soon that it is no use (:mod:`orkestr_console.core.postgres`). Each
    request under way has a socket of its client's and maybe one to the host, so as many files are
    allowed as the system lets us have.
    """
    pool = connections.settings["default"]["OPTIONS"]["pool"]
    pool |= {
        "timeout": settings.REQUEST_POOL_SECONDS,
        "connection_class": RequestConnection,
        "check": check_connection,
    }
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
