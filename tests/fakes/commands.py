"""What the fake host remembers of the commands that it was to run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Ran:
    """A command that was run."""

    sandbox: str
    command: str | Sequence[str]
    cwd: str
    env: dict[str, str]
    timeout_seconds: float | None
