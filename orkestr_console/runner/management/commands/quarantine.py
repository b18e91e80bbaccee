"""`manage.py quarantine`: list, restore or delete what was quarantined instead of deleted."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from orkestr_console.accounts.management.commands.mint_token import find_team
from orkestr_console.core.errors import DomainError
from orkestr_console.installation import services
from templates_app.services import adopt_image


class Command(BaseCommand):
    """List, restore or delete what is in quarantine."""

    help = "Show what was set aside instead of deleted; put it back, or delete it for good."

    def add_arguments(self, parser: CommandParser) -> None:
        """What to do, and with what."""
        parser.add_argument("action", choices=["list", "restore", "delete"])
        parser.add_argument("key", nargs="*", help="as `list` shows it, such as image.img_01J…")

        parser.add_argument("--team", help="with restore: give an image to this team as a template")
        parser.add_argument("--name", default="Put back", help="with --team: the template's name")

    def handle(self, *args: Any, **options: Any) -> None:
        """Do it, and say what was done."""
        keys: list[str] = options["key"]
        if (options["action"] == "list") == bool(keys):
            raise CommandError("give the names that `quarantine list` shows to restore or delete")
        try:
            if options["action"] == "list":
                self._list()
            for key in keys:
                self._do(options["action"], key, options["team"], options["name"])
        except DomainError as error:
            raise CommandError(error.detail) from error

    def _list(self) -> None:
        held = services.list_quarantine()
        for thing in held:
            at = datetime.fromtimestamp(thing.at, UTC)
            self.stdout.write(f"{thing.key}  {at:%Y-%m-%d %H:%M} UTC  {thing.detail}")
        if not held:
            self.stdout.write("Nothing is in quarantine.")

    def _do(self, action: str, key: str, team: str | None, name: str) -> None:
        if action == "restore":
            owner = find_team(team) if team else None
            thing = services.restore(key)
            self.stdout.write(f"{thing.kind} {thing.name} was put back.")
            if owner is not None and thing.kind == "image":
                template = adopt_image(owner, thing.name, name)
                self.stdout.write(f"It is template {template.pk} of {owner.name}.")
        else:
            services.delete(key)
            self.stdout.write(f"{key} was deleted.")
