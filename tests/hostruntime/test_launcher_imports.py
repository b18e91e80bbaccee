"""The launcher is forked twice for each command, and a fork costs what has been imported."""

from __future__ import annotations

import subprocess
import sys

# Each is megabytes, or a large library with relocations of its own.
HEAVY = {"asyncio", "decimal", "hashlib", "hostruntime.wire", "pydantic", "ssl", "tempfile", "uuid"}
MOST = 150


def test_it_imports_next_to_nothing() -> None:
    script = "import sys, hostruntime.container.lxc\nprint(*sys.modules)"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    imported = set(answer.stdout.decode().split())
    assert not imported & HEAVY
    assert len(imported) <= MOST
