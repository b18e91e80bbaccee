"""`manage.py up`: start everything and serve until Ctrl-C."""

from __future__ import annotations

import faulthandler
import os
import signal
from argparse import ArgumentParser
from subprocess import CalledProcessError
from types import FrameType
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from hostruntime.errors import HostError
from orkestr_console.runner.display import Display
from orkestr_console.runner.layout import StartError, layout_from
from orkestr_console.runner.postgres import PostgresError
from orkestr_console.runner.up import Console


class Command(BaseCommand):
    """What `make run` calls once the machine is ready."""

    help = "Start database, host agent, worker and web; serve until Ctrl-C."
    requires_system_checks = ()

    def add_arguments(self, parser: ArgumentParser) -> None:
        """One switch: the self-check builds a template, which a test may not want."""
        parser.add_argument("--no-self-check", dest="self_check", action="store_false")

    def handle(self, *args: Any, **options: Any) -> None:
        """Serve; exit status 0 after Ctrl-C, 1 if something did not start."""
        # SIGINT too: a shell starts a background job with it ignored.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, interrupt)
        # `kill -USR1` says where a start hangs.
        faulthandler.register(signal.SIGUSR1)
        try:
            display = Display(os.fdopen(os.dup(1), "w"))
            Console(layout_from(), display, self_check=options["self_check"]).run()
        except (StartError, PostgresError, HostError, OSError, CalledProcessError) as error:
            raise CommandError(f"cannot start: {error}") from error


def interrupt(_number: int, _frame: FrameType | None) -> None:
    """Treat SIGTERM like Ctrl-C."""
    raise KeyboardInterrupt
