"""Checks that run with nothing beside them, and checks that lanes take from one list.

Most of the suite waits: for containers, for processes that start, for deadlines. What a check in a
lane says is printed whole when it has ended; meanwhile a line a minute tells how far each is.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

TREE = Path(__file__).resolve().parents[1]
REPORT_SECONDS = 60.0
# Enough of a failed session of pytest to know what to look for; often only the end is kept.
EXCERPT_LINES = 12
EXCERPT_CHARACTERS = 200


@dataclass(frozen=True)
class Room:
    """A directory and environment in which checks run one at a time."""

    directory: Path
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Check:
    """A Python command, by default of this interpreter, and its display name.

    ``{room}`` in its arguments is its room's directory. It starts when the checks named in
    ``after`` have finished: they share something outside their rooms. With ``own_mounts`` nothing
    that others start meanwhile keeps a copy of what it mounts (mount_namespaces(7)).
    """

    name: str
    arguments: Sequence[str]
    python: str = sys.executable
    after: frozenset[str] = frozenset()
    own_mounts: bool = False

    def run(self, room: Room, output: int | None = None) -> int:
        """Run it; its exit status. Output goes to a descriptor, or to ours."""
        directory = str(room.directory)
        words = [word.replace("{room}", directory) for word in self.arguments]
        within = ["unshare", "--mount", "--propagation", "slave"] if self.own_mounts else []
        result = subprocess.run(
            [*within, self.python, *words],
            cwd=TREE,
            env=room.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        return result.returncode


class PendingChecks:
    """Checks that have not started; lanes claim the first that can."""

    def __init__(self, checks: Sequence[Check]) -> None:
        self._checks = list(checks)
        self._unfinished = {check.name for check in checks}
        self._changed = threading.Condition()

    def claim(self) -> Check | None:
        """Wait for a check that can start; None when none is left."""
        with self._changed:
            while self._checks:
                for check in self._checks:
                    if not check.after & self._unfinished:
                        self._checks.remove(check)
                        return check
                self._changed.wait()
        return None

    def mark_finished(self, check: Check) -> None:
        """Allow the checks after it to start."""
        with self._changed:
            self._unfinished.discard(check.name)
            self._changed.notify_all()

    def forget(self) -> None:
        """Start no more checks."""
        with self._changed:
            self._checks.clear()
            self._changed.notify_all()


@dataclass
class Verdicts:
    """The checks that ran, and which failed."""

    failed: list[str] = field(default_factory=list)
    # What pytest said of the failed tests, to be repeated at the end.
    excerpts: list[str] = field(default_factory=list)
    # The output file of each check that runs in a lane, by name.
    _running: dict[str, Path] = field(default_factory=dict)

    def run(self, check: Check, room: Room) -> None:
        """Run one check alone, with its output on ours."""
        report(f"== {check.name}")
        started = time.monotonic()
        self._record(check, check.run(room), started)

    def run_parallel(self, checks: Sequence[Check], rooms: Sequence[Room]) -> None:
        """Run them all, one per room in parallel, whether or not any fails."""
        pending = PendingChecks(checks)
        with ThreadPoolExecutor(len(rooms)) as pool:
            lanes = [pool.submit(self._run_lane, pending, room) for room in rooms]
            try:
                while wait(lanes, REPORT_SECONDS).not_done:
                    report(
                        f".. {', '.join(_progress(*one) for one in self._running.copy().items())}"
                    )
            finally:
                # Ctrl-C ends the running checks, and no other starts.
                pending.forget()
            for lane in lanes:
                lane.result()

    def _run_lane(self, pending: PendingChecks, room: Room) -> None:
        while (check := pending.claim()) is not None:
            try:
                self._run_captured(check, room)
            finally:
                pending.mark_finished(check)

    def _run_captured(self, check: Check, room: Room) -> None:
        report(f"== {check.name}: begun, and shown when it has ended")
        started = time.monotonic()
        with (room.directory / "said").open("wb") as output:
            self._running[check.name] = Path(output.name)
            status = check.run(room, output.fileno())
            del self._running[check.name]
            text = Path(output.name).read_text(errors="replace").rstrip("\n")
        # One check's output must not be in the middle of another's.
        with _print_lock:
            report(f"== {check.name}")
            report(text)
            self._record(check, status, started)
        if status != 0:
            self.excerpts += excerpt(text)

    def _record(self, check: Check, status: int, started: float) -> None:
        if status != 0:
            self.failed.append(check.name)
        report(
            f"-- {check.name}: {'failed' if status else 'ok'}, {time.monotonic() - started:.1f} s"
        )


_print_lock = threading.RLock()


def report(line: str) -> None:
    """Print immediately: the checks write to the same terminal."""
    with _print_lock:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()


def excerpt(text: str) -> list[str]:
    """The lines of a session of pytest that name its failed tests and their errors."""
    lines = re.findall(r"^(?:FAILED |ERROR |E  ).*$", text, re.MULTILINE)
    return [line[:EXCERPT_CHARACTERS] for line in lines[-EXCERPT_LINES:]]


def _progress(name: str, output: Path) -> str:
    """A check's progress, by pytest's last percentage at a line's end."""
    reached = re.findall(r"\[ *(\d+%)\]$", output.read_text(errors="replace"), re.MULTILINE)
    return f"{name} {reached[-1] if reached else '0%'}"
