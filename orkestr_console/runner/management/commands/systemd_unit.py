"""`manage.py systemd_unit`: print a unit that starts the console at boot."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError

from orkestr_console.runner.layout import StartError, layout_from
from orkestr_console.runner.service import SECRETS_FILE, configured_secrets, unit


class Command(BaseCommand):
    """Changes nothing: the operator puts it where it belongs."""

    help = "Print a systemd unit that starts the console at boot and again when it ends."
    requires_system_checks = ()

    def handle(self, *args: Any, **options: Any) -> None:
        """Print it, with today's environment."""
        try:
            self.stdout.write(unit(layout_from()), ending="")
        except StartError as error:
            raise CommandError(str(error)) from error
        if left_out := configured_secrets():
            self.stderr.write(
                f"{' and '.join(left_out)}: not in the unit, which everybody may read. Put it into "
                f"{SECRETS_FILE}, as NAME=value, of mode 0600"
            )
