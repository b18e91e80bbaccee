"""`manage.py selfcheck`: build, boot, run and delete through the REST API of a running console."""

from __future__ import annotations

import sys
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from orkestr_console.runner.display import Display
from orkestr_console.runner.layout import StartError, layout_from
from orkestr_console.runner.selfcheck import SelfCheck, SelfCheckError
from orkestr_console.runner.summary import known_credentials


class Command(BaseCommand):
    """The same check that `make run` makes, at any later time."""

    help = "Build a template, boot a sandbox from it, run a command, delete both; print the times."
    requires_system_checks = ()

    def handle(self, *args: Any, **options: Any) -> None:
        """Exit status 1, with the reason, when a step fails."""
        try:
            layout = layout_from()
            credentials = known_credentials(layout)
            if credentials is None:
                raise StartError(f"{layout.console_json} cannot be read: run it as root, after up")
            check = SelfCheck(layout.url, credentials.api_key, lambda _: None)
            check.run()
        except (StartError, SelfCheckError) as error:
            raise CommandError(str(error)) from error
        Display(sys.stdout).times(check.times)
