"""`manage.py down`: end the sandboxes and stop everything."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from orkestr_console.runner.down import DownError, bring_down, remove_state
from orkestr_console.runner.layout import StartError, layout_from


class Command(BaseCommand):
    """What `make down` and `make clean` call."""

    help = "End every sandbox and stop the console; with --remove, delete its data as well."
    requires_system_checks = ()

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Data is only removed when asked for."""
        parser.add_argument("--remove", action="store_true", help="delete var/ afterwards")

    def handle(self, *args: Any, **options: Any) -> None:
        """Exit status 0 when nothing is left, also when nothing ran."""
        try:
            layout = layout_from()
            bring_down(layout, self._say)
            if options["remove"]:
                remove_state(layout)
                self._say(f"{layout.var} removed")
        except (StartError, DownError, OSError) as error:
            raise CommandError(str(error)) from error
        self._say("done")

    def _say(self, text: str) -> None:
        self.stdout.write(f"  {text}")
