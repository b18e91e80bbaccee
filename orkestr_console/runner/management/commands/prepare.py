"""`manage.py prepare`: bring the schema up to date, gather static files, ensure the demo team."""

from __future__ import annotations

import io
import json
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from django.core.management import call_command
from django.core.management.base import BaseCommand
from django.db import connection
from django.db.migrations.executor import MigrationExecutor


class Command(BaseCommand):
    """What `manage.py up` runs between the database's start and the web's, in one process."""

    help = "Apply migrations, collect static files and make the demo team; print what was done."
    requires_system_checks = ()

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Where the demo team's credentials are kept."""
        parser.add_argument("--credentials", type=Path, required=True)
        parser.add_argument(
            "--sandboxes-ended", action="store_true", help="`make down` ended every sandbox"
        )

    def handle(self, *args: Any, **options: Any) -> None:
        """Print ``{"migrated": <how many migrations were applied>}``."""
        migrated = outstanding_migrations()
        silence = io.StringIO()
        if migrated:
            call_command("migrate", interactive=False, verbosity=0, stdout=silence)
        if options["sandboxes_ended"]:
            call_command("note_all_ended", stdout=silence)
        call_command("collectstatic", interactive=False, verbosity=0, stdout=silence)
        call_command("create_demo", file=options["credentials"], stdout=silence)
        self.stdout.write(json.dumps({"migrated": migrated}))


def outstanding_migrations() -> int:
    """How many migrations the database lacks."""
    executor = MigrationExecutor(connection)
    return len(executor.migration_plan(executor.loader.graph.leaf_nodes()))
