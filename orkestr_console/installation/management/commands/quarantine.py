"""`manage.py quarantine`: what was set aside instead of deleted; put it back, or delete it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from orkestr_console.errors import DomainError
from orkestr_console.installation import services


class Command(BaseCommand):
    """List, restore or delete what is in quarantine."""

    help = "Show what was set aside instead of deleted; put it back, or delete it for good."

    def add_arguments(self, parser: CommandParser) -> None:
        """What to do, and with what."""
        parser.add_argument("action", choices=["list", "restore", "delete"])
        parser.add_argument("key", nargs="*", help="as `list` shows it, such as image.img_01J…")

    def handle(self, *args: Any, **options: Any) -> None:
        """Do it, and say what was done."""
        keys: list[str] = options["key"]
        if (options["action"] == "list") == bool(keys):
            raise CommandError("give the names that `quarantine list` shows to restore or delete")
        try:
            if options["action"] == "list":
                self._list()
            for key in keys:
                self._do(options["action"], key)
        except DomainError as error:
            raise CommandError(error.detail) from error

    def _list(self) -> None:
        held = services.held()
        for thing in held:
            at = datetime.fromtimestamp(thing.at, UTC)
            self.stdout.write(f"{thing.key}  {at:%Y-%m-%d %H:%M} UTC  {thing.detail}")
        if not held:
            self.stdout.write("Nothing is in quarantine.")

    def _do(self, action: str, key: str) -> None:
        if action == "restore":
            thing = services.restore(key)
            self.stdout.write(f"{thing.kind} {thing.name} was put back.")
        else:
            services.delete(key)
            self.stdout.write(f"{key} was deleted.")
