"""What a guest is made of, for the table in the README."""

from __future__ import annotations

from tests.vm.console import TREE
from tests.vm.guest import Guest

QUESTIONS = {
    "kernel": "uname -r",
    "LXC": "lxc-start --version",
    "PostgreSQL": "ls /usr/lib/postgresql",
    "Python": f"{TREE}/.venv/bin/python -c 'import platform; print(platform.python_version())'",
    "commit": f"git -c safe.directory='*' -C {TREE} rev-parse --short HEAD",
}


def facts(guest: Guest) -> dict[str, str]:
    """Each heading's answer. Raises VmError."""
    return {name: " ".join(guest.root(ask).out.split()) for name, ask in QUESTIONS.items()}
