"""`manage.py installation`: whether database and state directory belong together."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from orkestr_console.core.errors import DomainError
from orkestr_console.installation import services


class Command(BaseCommand):
    """Show whether database and state belong together, or accept that they do."""

    help = "Show whether the database and the state directory belong together, or say they do."

    def add_arguments(self, parser: CommandParser) -> None:
        """What to do."""
        parser.add_argument("action", choices=["show", "accept"])

    def handle(self, *args: Any, **options: Any) -> None:
        """Do it."""
        try:
            if options["action"] == "accept":
                row = services.adopt()
                self.stdout.write(f"Database and state belong together from now on ({row.pk}).")
                return
            seen, row = services.host_standing(), services.current()
        except DomainError as error:
            raise CommandError(error.detail) from error
        self.stdout.write(f"database         {row.pk}, mark {row.epoch}")
        self.stdout.write(f"state directory  {seen.id or 'claimed by none'}, mark {seen.epoch}")
        if why := seen.mismatch or row.mismatch:
            raise CommandError(
                f"{why} Nothing is reconciled. Put the right one beside the other, or say "
                "`manage.py installation accept`: what no row names is then set aside, a few "
                "things at a time."
            )
