"""`manage.py backup`: back up this installation while it runs, or verify its backups."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from hostruntime.backup.vault import Vault
from orkestr_console.runner.backup.commands import ProgressReporter, command_errors
from orkestr_console.runner.backup.taking import KEEP, create_backup, verify
from orkestr_console.runner.layout import layout_from


class Command(BaseCommand):
    """Make one, or read all that are there."""

    help = "Back this installation up into a directory, copying only what is new there."
    requires_system_checks = ()

    def add_arguments(self, parser: ArgumentParser) -> None:
        """The directory, and what to do with it."""
        parser.add_argument("directory", type=Path, help="root's alone; on another disk")
        parser.add_argument(
            "--verify",
            action="store_true",
            help="only read it, and name what is damaged",
        )
        parser.add_argument(
            "--keep", type=int, default=KEEP, help=f"how many backups stay there (default {KEEP})"
        )

    def handle(self, *args: Any, **options: Any) -> None:
        """Exit status 0 when a backup was made, or nothing is damaged."""
        directory: Path = options["directory"].absolute()
        if options["keep"] < 1:
            raise CommandError("--keep takes 1 or more")
        teller = ProgressReporter(self.stdout)
        vault = Vault(directory, teller.on_progress)
        teller.progress = vault.progress
        with command_errors("backup", directory):
            if options["verify"]:
                self._verify(directory, vault, teller)
            else:
                self._make(directory, options["keep"], vault, teller)

    def _verify(self, directory: Path, vault: Vault, teller: ProgressReporter) -> None:
        damaged = verify(directory, vault, teller.report)
        if damaged:
            raise CommandError("damaged in {}:\n  {}".format(directory, "\n  ".join(damaged)))
        self.stdout.write("Everything is what was put there.")

    def _make(self, directory: Path, keep: int, vault: Vault, teller: ProgressReporter) -> None:
        made = create_backup(layout_from(), directory, keep, vault, teller.report)
        self.stdout.write(f"Backup {made.name}: the database, {made.text}.")
        for lost in made.lost:
            self.stdout.write(f"Not in it, as it could not be had: {lost}.")
