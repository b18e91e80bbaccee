"""``python -m tests.host.watched``: the host agent, which tells what its event loop waits for.

Whatever the loop's own thread does with a file is a line in the file that ``TOUCHED`` names: what
was done, with what, and which lines of ours did it.  Control groups, devices, proc(5) and the ramfs
of containers' figures are the kernel's memory, and not looked at.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from hostruntime.agent.__main__ import main
from tests.host.agent import REPO, Agent

VARIABLE = "TOUCHED"
_OF_THE_KERNEL = ("/proc/", "/sys/", "/dev/")
_FIGURES = re.compile(r"/run/orkestr/\d+/figures/")
# Code, which is read once.
_CODE = (f"{sys.prefix}/", f"{sys.base_prefix}/lib")
# Of what sys.addaudithook() hears; and what it does not.
_EVENTS = frozenset(
    {"open", "glob.glob", "shutil.rmtree"}
    | {f"os.{name}" for name in ("chmod", "chown", "link", "listdir", "mkdir", "remove", "rename")}
    | {f"os.{name}" for name in ("rmdir", "scandir", "symlink", "truncate", "utime", "walk")}
)
_CALLS = ("stat", "lstat", "statvfs", "readlink", "access")
_BY_DESCRIPTOR = ("fsync", "fdatasync", "ftruncate", "sendfile")


@contextmanager
def watched(agent: Agent, touched: Path) -> Iterator[None]:
    """Have an agent run anew, and be watched; what its loop waits for is in ``touched``."""
    plain, command = agent.environment, agent.command
    _restart(agent, {**plain, VARIABLE: str(touched)}, [sys.executable, "-m", __name__])
    try:
        yield
    finally:
        _restart(agent, plain, command)


def _restart(agent: Agent, environment: dict[str, str], command: list[str]) -> None:
    agent.stop()
    agent.environment, agent.command = environment, command
    agent.start()


class _Watch:
    def __init__(self, touched: str) -> None:
        self._out = os.open(touched, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def begin(self) -> None:
        sys.addaudithook(self._heard)
        for name in _CALLS:
            setattr(os, name, self._noted(name, getattr(os, name)))
        for name in _BY_DESCRIPTOR:
            setattr(os, name, self._noted(name, getattr(os, name), whatever=True))

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _EVENTS:
            self._note(event, arguments[0])

    def _noted(
        self, name: str, real: Callable[..., Any], *, whatever: bool = False
    ) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self._note(f"os.{name}", arguments[0], whatever=whatever)
            return real(*arguments, **options)

        return call

    def _note(self, what: str, path: object, *, whatever: bool = False) -> None:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return
        named = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        in_memory = named.startswith(_OF_THE_KERNEL + _CODE) or _FIGURES.match(named)
        if whatever or (named and not in_memory):
            os.write(self._out, f"{what} {named} by {_ours(sys._getframe())}\n".encode())


def _ours(frame: FrameType | None) -> str:
    """The lines of the host runtime that are being run, the innermost first."""
    found = []
    while frame is not None:
        file = frame.f_code.co_filename
        if "/hostruntime/" in file:
            found.append(f"{Path(file).relative_to(REPO)}:{frame.f_lineno}")
        frame = frame.f_back
    return " ← ".join(found[:3])


if __name__ == "__main__":
    _Watch(os.environ[VARIABLE]).begin()
    sys.exit(main())
