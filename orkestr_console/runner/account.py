"""The system user of web and worker, and the command prefix that runs a program as it."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from orkestr_console.runner.confine import drop_privileges_command

USER = "orkestr"


def ensure_user(name: str = USER) -> pwd.struct_passwd:
    """The system user, created if the machine has none; needs root.

    Raises ``subprocess.CalledProcessError`` with useradd(8)'s output if it fails.
    """
    try:
        return pwd.getpwnam(name)
    except KeyError:
        subprocess.run(
            [
                *("useradd", "--system", "--user-group", "--no-create-home"),
                *("--home-dir", "/nonexistent", "--shell", "/usr/sbin/nologin", name),
            ],
            check=True,
            capture_output=True,
            text=True,
        )
        return pwd.getpwnam(name)


def interpreter_paths(tree: Path) -> list[Path]:
    """The directories that a Python program of this tree reads: tree, venv and interpreter."""
    return [tree.resolve(), Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()]


def confined_command(user: str, needs: Sequence[Path], *, stop_signal: str = "TERM") -> list[str]:
    """The command prefix that runs a program as ``user``, who sees only ``needs``."""
    arguments = [argument for need in needs for argument in ("--need", str(need))]
    confine = [sys.executable, "-m", "orkestr_console.runner.confine"]
    return [*confine, "--user", user, "--stop-signal", stop_signal, *arguments, "--"]


@dataclass(frozen=True)
class Identity:
    """How unprivileged programs run here: a command prefix, and a warning for the operator."""

    user: str
    prefix: tuple[str, ...]
    warning: str = ""


def choose_identity(tree: Path, *extra_paths: Path) -> Identity:
    """The ``orkestr`` user if it can really import this tree, else root without any power.

    ``more`` are further directories that the programs need to see.

    Tried rather than computed: file modes, ACLs, mount options and security modules all have a
    say in whether another user can read a clone.
    """
    prefix = confined_command(USER, [*interpreter_paths(tree), *extra_paths])
    probe = [sys.executable, "-c", "import django, orkestr_console.core.ids"]
    result = subprocess.run(
        [*prefix, *probe], cwd=tree, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    if result.returncode == 0:
        return Identity(USER, tuple(prefix))
    reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
    return Identity(
        "root",
        # Root without capabilities passes where the user would only as a member of its group.
        tuple(drop_privileges_command("root", group=USER)),
        f"web and worker run as root without capabilities, because the user '{USER}' cannot use "
        f"{tree} ({reason}). To fix: chmod -R go+rX {tree}, or clone somewhere like /opt.",
    )


def change_owner(path: Path, user: str) -> None:
    """Make ``user`` the owner of a file or directory."""
    entry = pwd.getpwnam(user)
    if path.stat().st_uid != entry.pw_uid:
        os.chown(path, entry.pw_uid, entry.pw_gid)
