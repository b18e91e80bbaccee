"""Processes as tests see them: those of others on the machine come and end while one looks."""

from __future__ import annotations

import os
from contextlib import suppress
from itertools import count
from pathlib import Path

# What a launcher calls itself.
LAUNCHER = "orkestr hostruntime.container.lxc"
_numbers = count()


def command_lines() -> dict[int, str]:
    """The command line of each process that is there, words apart by blanks, by process id."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        found[int(entry.name)] = line.replace(b"\0", b" ").decode(errors="replace").strip()
    return found


def launcher_pids(agent: int) -> list[int]:
    """The launchers of a host agent, whichever of its threads started them (proc(5), children)."""
    lines = command_lines()
    started: list[int] = []
    for path in Path(f"/proc/{agent}/task").glob("*/children"):
        # Threads come and go.
        with suppress(FileNotFoundError, ProcessLookupError):
            started += map(int, path.read_text().split())
    return [pid for pid in started if lines.get(pid, "").startswith(LAUNCHER)]


def open_files(pid: int) -> list[str]:
    """What the descriptors of a process are of (proc_pid_fd(5)), without those it is closing."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        # Listed a moment ago: who is at work opens and closes some meanwhile.
        with suppress(FileNotFoundError):
            found.append(str(link.readlink()))
    return found


def own_mark() -> str:
    """Digits that no command line has but those of who asked, good as the seconds of a `sleep`."""
    # Another run of the suite has a process of another number (at most 4194304, proc(5)).
    return f"9{os.getpid():07}{next(_numbers):03}"


def commands_containing(mark: str) -> list[str]:
    """The command lines that have ``mark`` in them."""
    return [line for line in command_lines().values() if mark in line]
