"""`manage.py note_all_ended`: records in the database that `make down` ended all sandboxes."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand

from sandboxes_app.services.lifecycle import terminate_all


class Command(BaseCommand):
    """Run by `manage.py prepare` at the first start after a `make down`."""

    help = "Mark every sandbox as terminated: their containers are gone."
    requires_system_checks = ()

    def handle(self, *args: Any, **options: Any) -> None:
        """Print how many there were."""
        self.stdout.write(str(terminate_all()))
