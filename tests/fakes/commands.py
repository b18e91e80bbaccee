"""What the fake host remembers of the commands that it was to run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hostruntime.errors import HostUnavailable
from hostruntime.host.quotas import RunningCommands


@dataclass(frozen=True)
class Ran:
    """A command that was run."""

    sandbox: str
    command: str | Sequence[str]
    cwd: str
    env: dict[str, str]
    timeout_seconds: float | None


class FakeCommands:
    """How many commands run of each scope, as the real host counts them."""

    down: bool

    def __init__(self) -> None:
        self.running = RunningCommands()

    def commands(self, *, seconds: float = 60.0) -> dict[str, int]:
        """As the client."""
        if self.down:
            raise HostUnavailable("The host agent does not answer.")
        return self.running.by_scope()
