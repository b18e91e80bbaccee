"""Running a command in a container: separate pipes, a time limit, the whole tree killed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Started:
    """The command runs; ``pid`` is its pid as seen inside the container."""

    pid: int


@dataclass(frozen=True)
class Chunk:
    """Bytes the command wrote."""

    stream: Literal["stdout", "stderr"]
    data: bytes


@dataclass(frozen=True)
class Exited:
    """The command ended by itself or by a signal; ``code`` is 128 + n for signal n."""

    code: int
    signal: int | None
    duration_ms: int
    out_of_memory: bool = False


@dataclass(frozen=True)
class TimedOut:
    """The command ran past its time and its process tree was killed."""

    duration_ms: int


Frame = Started | Chunk | Exited | TimedOut
