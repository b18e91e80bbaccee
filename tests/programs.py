"""Programs for tests of patience: real processes that work slowly, hang, or never end."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

# Burns a tenth of a second of CPU, sleeps three, and so on: slow, and at work.
WORKING = """\
import sys, time
def burst():
    end = time.thread_time() + 0.1
    while time.thread_time() < end:
        pass
    time.sleep(0.3)
for _ in range(int(sys.argv[1])):
    burst()
print("done", flush=True)
"""
# Wakes twenty times a second and does nothing: what a program with timers does when it hangs.
IDLING = "import time\nwhile True: time.sleep(0.05)\n"
BUSY = "while True: pass\n"


def python(program: str, *arguments: object) -> list[str]:
    """The command line that runs a program of this module."""
    return [sys.executable, "-c", program, *map(str, arguments)]


@contextmanager
def running(argv: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process for as long as the block lasts."""
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()
