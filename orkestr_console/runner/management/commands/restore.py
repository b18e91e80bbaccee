"""`manage.py restore`: restore a backup into an empty installation."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand

from hostruntime.backup.vault import Vault
from orkestr_console.runner.backup.commands import ProgressReporter, command_errors
from orkestr_console.runner.backup.restoring import restore
from orkestr_console.runner.layout import layout_from


class Command(BaseCommand):
    """The newest backup, or the one that is named."""

    help = "Restore a backup into this installation, which must be empty and not running."
    requires_system_checks = ()

    def add_arguments(self, parser: ArgumentParser) -> None:
        """The directory, and which backup in it."""
        parser.add_argument("directory", type=Path, help="where `manage.py backup` put it")
        parser.add_argument("--name", help="such as 2026-11-29T22.05.00Z; the newest otherwise")

    def handle(self, *args: Any, **options: Any) -> None:
        """Exit status 0 when all of it was restored."""
        directory: Path = options["directory"].absolute()
        teller = ProgressReporter(self.stdout)
        vault = Vault(directory, teller.on_progress)
        teller.progress = vault.progress
        with command_errors("restore", directory):
            found = restore(layout_from(), directory, options["name"], vault, teller.report)
        self.stdout.write(
            f"Restored: the database, {len(found.stored)} images and snapshots, "
            f"{len(found.volumes)} volumes. Start the console."
        )
        for lost in found.lost:
            self.stdout.write(f"Not in it, as it could not be had when it was made: {lost}.")
