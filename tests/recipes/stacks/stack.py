"""What a stack is, and how its steps are written down."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stack:
    """A template's steps on a base; how it is used, and what must come out of each use."""

    name: str
    base: str
    steps: tuple[str, ...]
    uses: tuple[tuple[str, str], ...]


def apt(packages: str) -> str:
    """Install packages of Debian's."""
    return f"apt-get update && apt-get install -y --no-install-recommends {packages}"


def file(path: str, text: str) -> str:
    """Write a file, whose text ends with a newline."""
    return f"mkdir -p $(dirname {path}) && cat > {path} <<'END_OF_FILE'\n{text}END_OF_FILE"


def once(probe: str) -> str:
    """Wait until a probe succeeds: for what takes a moment to start."""
    return f"for _ in $(seq 300); do {probe} && break; sleep 0.2; done"
