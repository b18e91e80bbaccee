#!/usr/bin/env python3
"""The operator's command line: `./manage.py help` lists the commands."""

from __future__ import annotations

import os
import sys
from pathlib import Path

TREE = Path(__file__).resolve().parent
ENVIRONMENT = TREE / ".venv"


def main() -> None:
    """Run a command, in the virtual environment that `make run` made."""
    leave_no_bytecode_in_anothers_clone()
    try:
        from django.core.management import execute_from_command_line
    except ImportError:
        go_into_the_environment()
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "orkestr_console.settings")
    try:
        execute_from_command_line(sys.argv)
    except PermissionError as error:
        sys.exit(f"manage.py: only root may use {error.filename}: say `sudo ./manage.py …`.")


def leave_no_bytecode_in_anothers_clone() -> None:
    """Write no directories of root's between somebody's own files, nor let programs we start."""
    if os.geteuid() != TREE.stat().st_uid:
        sys.dont_write_bytecode = True
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"


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
