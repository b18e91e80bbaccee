"""Checks that run with nothing beside them, and checks that two lanes take from one list.

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
class Room:
    """Where checks run that do not run at once: a directory, and an environment that names it."""

    directory: Path
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Check:
    """A command of a Python's, this one if none is named, and the name that people know it by.

    ``{room}`` in its arguments is its room's directory. It begins when those have ended that
    ``after`` names: with them it shares what is in no room.
    """

    name: str
    arguments: Sequence[str]
    python: str = sys.executable
    after: frozenset[str] = frozenset()

    def run(self, room: Room, output: int | None = None) -> int:
        """The exit status; what it says goes to a descriptor, or where ours goes."""
        place = str(room.directory)
        words = [word.replace("{room}", place) for word in self.arguments]
        done = subprocess.run(
            [self.python, *words],
            cwd=TREE,
            env=room.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        return done.returncode


class Waiting:
    """Checks that have not begun; lanes take the first that may."""

    def __init__(self, checks: Sequence[Check]) -> None:
        self._checks = list(checks)
        self._not_ended = {check.name for check in checks}
        self._changed = threading.Condition()

    def take(self) -> Check | None:
        """The next one, as soon as there is one that may begin; None when none is left."""
        with self._changed:
            while self._checks:
                for check in self._checks:
                    if not check.after & self._not_ended:
                        self._checks.remove(check)
                        return check
                self._changed.wait()
        return None

    def ended(self, check: Check) -> None:
        """Let those begin that come after it."""
        with self._changed:
            self._not_ended.discard(check.name)
            self._changed.notify_all()

    def forget(self) -> None:
        """Let none begin any more."""
        with self._changed:
            self._checks.clear()
            self._changed.notify_all()


@dataclass
class Verdicts:
    """What was run and whether it passed."""

    failed: list[str] = field(default_factory=list)
    # Where what runs in a lane now writes to, by its name.
    _running: dict[str, Path] = field(default_factory=dict)

    def run(self, check: Check, room: Room) -> None:
        """Run one check with nothing beside it, its output straight to ours."""
        say(f"== {check.name}")
        began = time.monotonic()
        self._conclude(check, check.run(room), began)

    def run_beside(self, checks: Sequence[Check], rooms: Sequence[Room]) -> None:
        """Run them all, as many at once as there are rooms, whatever becomes of any of them."""
        waiting = Waiting(checks)
        with ThreadPoolExecutor(len(rooms)) as pool:
            lanes = [pool.submit(self._run_lane, waiting, room) for room in rooms]
            try:
                while wait(lanes, TELL_SECONDS).not_done:
                    say(f".. {', '.join(_progress(*one) for one in self._running.copy().items())}")
            finally:
                # Ctrl-C ends the checks that run, and no other begins.
                waiting.forget()
            for lane in lanes:
                lane.result()

    def _run_lane(self, waiting: Waiting, room: Room) -> None:
        while (check := waiting.take()) is not None:
            try:
                self._run_apart(check, room)
            finally:
                waiting.ended(check)

    def _run_apart(self, check: Check, room: Room) -> None:
        say(f"== {check.name}: begun, and shown when it has ended")
        began = time.monotonic()
        with (room.directory / "said").open("wb") as output:
            self._running[check.name] = Path(output.name)
            status = check.run(room, output.fileno())
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


def _progress(name: str, output: Path) -> str:
    """How far a check is, by the last percentage that pytest has written at a line's end."""
    reached = re.findall(r"\[ *(\d+%)\]$", output.read_text(errors="replace"), re.MULTILINE)
    return f"{name} {reached[-1] if reached else '0%'}"
