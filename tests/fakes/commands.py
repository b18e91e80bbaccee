"""What the fake host remembers of the commands that it was to run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hostruntime.errors import HostUnavailable
from hostruntime.host.quotas import RunningCommands
from hostruntime.wire.health import CapacityStatus, Health


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
        super().__init__()
        self.running = RunningCommands()

    def commands(self, *, seconds: float = 60.0) -> dict[str, int]:
        """As the client."""
        if self.down:
            raise HostUnavailable("The host agent does not answer.")
        return self.running.by_scope()

    def health(self, *, seconds: float = 60.0) -> Health:
        """As the client."""
        if self.down:
            raise HostUnavailable("The host agent does not answer.")
        room = CapacityStatus(7, 250, 7168, 262_144, 7.5, 512.0, 9000, 1024)
        return Health("0", "/nowhere", 0, "v2", capacity=room)
