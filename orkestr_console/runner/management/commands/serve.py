"""`manage.py serve`: the web processes, serving console, REST and WebSockets until SIGTERM."""

from __future__ import annotations

import gc
import resource
from importlib import import_module
from typing import Any

import uvloop
from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import connections

from orkestr_console.core.listening import listen_on
from orkestr_console.core.postgres import RequestConnection, check_connection
from orkestr_console.http.processes import Place, WebProcesses

# A request makes thousands of objects and few cycles; with Python's 700, every call pays for a
# collection or two.
GC_THRESHOLDS = 10_000, 20, 20


class Command(BaseCommand):
    """Run the web processes in the foreground."""

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
        # Once, before any process is forked, which then shares it.
        import_module("orkestr_console.asgi")
        port = options["port"]
        try:
            sockets = listen_on(options["address"] or settings.LISTEN, port)
        except OSError as error:
            raise CommandError(f"cannot listen on port {port}: {error.strerror}") from None
        if not WebProcesses(sockets, settings.WEB_PROCESSES, serve).run():
            raise CommandError("the web processes end as they start; the log says why")


def serve(place: Place) -> None:
    """The main function of a web process; never returns."""
    gc.set_threshold(*GC_THRESHOLDS)
    # Before Daphne makes its event loop of it, which must not be shared with another process.
    uvloop.install()
    from orkestr_console.accounts import audit_spool
    from orkestr_console.asgi import application
    from orkestr_console.http.daphne import ConsoleServer, exit_process
    from orkestr_console.http.readiness import readiness

    readiness.start()
    audit_spool.start(settings.AUDIT_SPOOL)
    ConsoleServer(application, place).run()
    audit_spool.stop()
    exit_process(0)


def use_request_settings() -> None:
    """Configure the process for requests, before there is a pool or a connection.

    Whoever waits is told soon that it is no use (:mod:`orkestr_console.core.postgres`). Each
    request under way has a socket of its client's and maybe one to the host, so as many files are
    allowed as the system lets us have.
    """
    pool = connections.settings["default"]["OPTIONS"]["pool"]
    pool |= {
        "max_size": min(pool["max_size"], settings.WEB_CONNECTIONS // settings.WEB_PROCESSES),
        "timeout": settings.REQUEST_POOL_SECONDS,
        "connection_class": RequestConnection,
        "check": check_connection,
    }
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
