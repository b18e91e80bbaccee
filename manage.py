#!/usr/bin/env python3
"""The operator's command line: `./manage.py help` lists the commands."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ENVIRONMENT = Path(__file__).resolve().parent / ".venv"


def main() -> None:
    """Run a command, in the virtual environment that `make run` made."""
    try:
        from django.core.management import execute_from_command_line
    except ImportError:
        go_into_the_environment()
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "orkestr_console.settings")
    try:
        execute_from_command_line(sys.argv)
    except PermissionError as error:
        sys.exit(f"manage.py: only root may use {error.filename}: say `sudo ./manage.py …`.")


def go_into_the_environment() -> None:
    """Start again with its Python; say what to do where there is none yet."""
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists() or Path(sys.prefix) == ENVIRONMENT:
        sys.exit(
            "manage.py: the Python packages are not installed; `make doctor` installs them and "
            "says what else this machine lacks, `make run` starts everything."
        )
    os.execv(python, [str(python), *sys.argv])


if __name__ == "__main__":
    main()
