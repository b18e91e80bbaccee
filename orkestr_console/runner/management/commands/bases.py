"""`manage.py bases`: the built-in base images, and making one that is made on request."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from hostruntime.client.host_client import HostClient
from hostruntime.errors import HostError
from hostruntime.wire.images import BaseInfo
from orkestr_console.runner.layout import StartError, layout_from

MEGABYTE = 10**6


class Command(BaseCommand):
    """List the base images, or make one."""

    help = "List the built-in base images of this host; make one now, or again if that failed."
    requires_system_checks = ()

    def add_arguments(self, parser: CommandParser) -> None:
        """What to do, and with which."""
        parser.add_argument("action", nargs="?", choices=["list", "make"], default="list")
        parser.add_argument("name", nargs="*", help="with make: such as code-interpreter")

    def handle(self, *args: Any, **options: Any) -> None:
        """Do it, and say what was done."""
        names: list[str] = options["name"]
        if (options["action"] == "list") == bool(names):
            raise CommandError("say `bases list`, or `bases make NAME`")
        try:
            with HostClient(layout_from().host_socket) as host:
                for name in names:
                    self._make(host, name)
                if not names:
                    self._list(host.bases())
        except (HostError, StartError) as error:
            raise CommandError(str(error)) from error

    def _list(self, bases: list[BaseInfo]) -> None:
        for base in bases:
            self.stdout.write(f"{base.name:<18} {description(base)}")

    def _make(self, host: HostClient, name: str) -> None:
        """If this is interrupted, the agent goes on."""
        for line in host.ensure_base(name):
            if line.message:
                self.stdout.write(line.message)
                self.stdout.flush()
        self.stdout.write(f"{name} is ready.")


def description(base: BaseInfo) -> str:
    """A base's state in words."""
    if base.state == "ready":
        return f"ready, {(base.size_bytes or 0) / MEGABYTE:,.0f} MB"
    if base.state == "building":
        return f"being made: {base.progress or 'just begun'}"
    if base.state == "failed":
        return f"could not be made: {base.error}"
    return "not made yet; it is when it is first used" if base.on_request else "not made yet"
