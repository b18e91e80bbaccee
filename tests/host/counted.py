"""``python -m tests.host.counted``: the host agent, which counts what it does.

When it gets SIGUSR1 it writes how often it has used a thread of its pool, started a thread or a
program, opened or renamed a file, and flushed one, into the file that ``COUNTS`` names, as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from hostruntime.agent.__main__ import main
from hostruntime.host import kernel
from tests.host.agent import Agent, eventually

VARIABLE = "COUNTS"
_EVENTS = {"open": "files opened", "os.rename": "files renamed", "subprocess.Popen": "programs"}
_counts: Counter[str] = Counter()


@contextmanager
def counting(agent: Agent, file: Path) -> Iterator[Callable[[], Counter[str]]]:
    """Have an agent run anew, and count; yields what returns the numbers until now."""
    plain, command = agent.environment, agent.command

    def numbers() -> Counter[str]:
        file.unlink(missing_ok=True)
        os.kill(agent.pid, signal.SIGUSR1)
        for _ in eventually():
            if file.exists():
                break
        return Counter(json.loads(file.read_text()))

    _restart(agent, {**plain, VARIABLE: str(file)}, [sys.executable, "-m", __name__])
    try:
        yield numbers
    finally:
        _restart(agent, plain, command)


def _restart(agent: Agent, environment: dict[str, str], command: list[str]) -> None:
    agent.stop()
    agent.environment, agent.command = environment, command
    agent.start()


def _count_calls(owner: type | ModuleType, method: str, what: str) -> None:
    real: Callable[..., Any] = getattr(owner, method)

    def call(*arguments: Any, **options: Any) -> Any:
        _counts[what] += 1
        return real(*arguments, **options)

    setattr(owner, method, call)


def _heard(event: str, details: tuple[Any, ...]) -> None:
    # The firewall is listed every five seconds, however many sandboxes come and go meanwhile.
    if event in _EVENTS and not (event == "subprocess.Popen" and "list" in details[1]):
        _counts[_EVENTS[event]] += 1


def _write(*_: object) -> None:
    file = Path(os.environ[VARIABLE])
    temporary = file.with_suffix(".new")
    temporary.write_text(json.dumps(_counts))
    temporary.rename(file)


if __name__ == "__main__":
    _count_calls(ThreadPoolExecutor, "submit", "uses of threads")
    _count_calls(threading.Thread, "start", "threads started")
    for wait in ("fsync", "syncfs"):
        _count_calls(kernel, wait, "flushes")
    sys.addaudithook(_heard)
    signal.signal(signal.SIGUSR1, _write)
    sys.exit(main())
