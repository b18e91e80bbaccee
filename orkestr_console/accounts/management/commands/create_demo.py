"""`manage.py create_demo`: make the demo team and print its way in as JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from orkestr_console.accounts.demo import ensure_demo


class Command(BaseCommand):
    """Make the demo team, its admin and an API token, where missing."""

    help = "Create the demo team, its admin and an API token; print them as JSON."

    def add_arguments(self, parser: CommandParser) -> None:
        """Where what an earlier run printed may be found."""
        parser.add_argument(
            "--file",
            type=Path,
            help="JSON of an earlier run: what still works of it is kept; it is then replaced",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        """Print ``{user, password, team, api_key}``; with ``--file``, write it there instead."""
        path: Path | None = options["file"]
        demo = ensure_demo(read(path) if path else {})
        if path is None:
            self.stdout.write(json.dumps(demo))
        else:
            # Whatever else the file says (the URL, say) stays.
            replace(path, {**read(path), **demo})


def read(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty when there is none to be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def replace(path: Path, record: dict[str, Any]) -> None:
    """Write a file that only its owner may read, in one step."""
    draft = path.with_name(f".{path.name}.new")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        json.dump(record, stream, indent=2)
        stream.write("\n")
    draft.rename(path)
