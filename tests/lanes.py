"""Checks that run one after the other, and lanes of them that run beside each other.

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
TELL_SECONDS = 60.0


@dataclass(frozen=True)
class Check:
    """A command of a Python's, this one if none is named, and the name that people know it by."""

    name: str
    arguments: Sequence[str]
    python: str = sys.executable


@dataclass(frozen=True)
class Room:
    """Where checks run that do not run at once: a directory, and an environment that names it."""

    directory: Path
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Lane:
    """Checks to run one after the other."""

    room: Room
    checks: Sequence[Check]


@dataclass
class Verdicts:
    """What was run and whether it passed."""

    failed: list[str] = field(default_factory=list)
    # Where what runs in a lane now writes to, by its name.
    _running: dict[str, Path] = field(default_factory=dict)
    _stopping: bool = False

    def run(self, check: Check, environment: Mapping[str, str]) -> None:
        """Run one check with nothing beside it, its output straight to ours."""
        say(f"== {check.name}")
        began = time.monotonic()
        self._conclude(check, _run(check, environment), began)

    def run_beside(self, lanes: Sequence[Lane]) -> None:
        """Run lanes at once, each to its end, whatever becomes of a check in it or another."""
        with ThreadPoolExecutor(len(lanes)) as pool:
            going = [pool.submit(self._run_lane, lane) for lane in lanes]
            try:
                while wait(going, TELL_SECONDS).not_done:
                    say(f".. {', '.join(_progress(*one) for one in self._running.copy().items())}")
            finally:
                # Ctrl-C ends the checks that run, and no other begins.
                self._stopping = True
            for lane in going:
                lane.result()
        self._stopping = False

    def _run_lane(self, lane: Lane) -> None:
        for number, check in enumerate(lane.checks):
            if not self._stopping:
                self._run_apart(check, lane.room, f"check-{number}.out")

    def _run_apart(self, check: Check, room: Room, name: str) -> None:
        say(f"== {check.name}: begun, and shown when it has ended")
        began = time.monotonic()
        with (room.directory / name).open("wb") as output:
            self._running[check.name] = Path(output.name)
            status = _run(check, room.environment, output.fileno())
            del self._running[check.name]
            said = Path(output.name).read_text(errors="replace").rstrip("\n")
        # What one says is not to stand in the middle of what another says.
        with _saying:
            say(f"== {check.name}")
            say(said)
            self._conclude(check, status, began)

    def _conclude(self, check: Check, status: int, began: float) -> None:
        if status != 0:
            self.failed.append(check.name)
        say(f"-- {check.name}: {'failed' if status else 'ok'}, {time.monotonic() - began:.1f} s")


_saying = threading.RLock()


def say(line: str) -> None:
    """Print at once: the checks write to the same terminal."""
    with _saying:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()


def _run(check: Check, environment: Mapping[str, str], output: int | None = None) -> int:
    """The exit status of a check; its output goes to a descriptor, or where ours goes."""
    done = subprocess.run(
        [check.python, *check.arguments],
        cwd=TREE,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
    )
    return done.returncode


def _progress(name: str, output: Path) -> str:
    """How far a check is, by the last percentage that pytest has written at a line's end."""
    reached = re.findall(r"\[ *(\d+%)\]$", output.read_text(errors="replace"), re.MULTILINE)
    return f"{name} {reached[-1] if reached else '0%'}"
