"""`manage.py previews`: the front, which carries visitors to ports in sandboxes, until SIGTERM."""

from __future__ import annotations

import asyncio
import os
from functools import partial
from importlib import import_module
from typing import Any

import uvloop
from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import connections

from orkestr_console.core.listening import listen_on, trusted_proxies
from orkestr_console.core.preview_base import PreviewBase
from orkestr_console.http.processes import Place, WebProcesses
from orkestr_console.runner.management.commands.serve import use_request_settings

# One statement a request, and a few more for one that wakes a sandbox.
CONNECTIONS = 4


class Command(BaseCommand):
    """Run the front in the foreground, and replace it when it dies or hangs."""

    help = "Serve previews of ports in sandboxes until SIGTERM."

    def add_arguments(self, parser: CommandParser) -> None:
        """Where to listen."""
        parser.add_argument("--port", type=int, default=settings.PREVIEW_PORT)

    def handle(self, *args: Any, **options: Any) -> None:
        """Serve; returns after SIGTERM."""
        base = settings.PREVIEW_BASE
        if base is None:
            raise CommandError("previews are off: ORKESTR_PREVIEW_PORT says so")
        use_request_settings(CONNECTIONS)
        # Once, before a process is forked, which then shares it.
        import_module("orkestr_console.previews.front")
        try:
            sockets = listen_on(settings.LISTEN, options["port"])
        except OSError as error:
            raise CommandError(
                f"cannot listen on port {options['port']}: {error.strerror}"
            ) from None
        if not WebProcesses(sockets, 1, partial(serve, base=base)).run():
            raise CommandError("the front ends as it starts; the log says why")


def serve(place: Place, base: PreviewBase) -> None:
    """The main function of the front's process; never returns."""
    from orkestr_console.previews.front import Front, Limits, serve_visitors

    # Only a proxy that ends TLS has something to say of visitors.
    trusted = os.environ.get("ORKESTR_TRUSTED_PROXIES")
    proxies = trusted_proxies(trusted) if base.is_secure else []
    front = Front(base, proxies, Limits.of_process())
    asyncio.run(serve_visitors(front, place), loop_factory=uvloop.new_event_loop)
    connections.close_all()
    os._exit(0)
