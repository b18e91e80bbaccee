"""The part of the host agent in memory that is about background commands."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hostruntime.errors import ContainerGone, HostError, NotFound
from hostruntime.wire.background import (
    CommandFrame,
    CommandInfo,
    CommandOutput,
    FollowCommand,
    StartCommand,
)
from hostruntime.wire.commands import RefusedRequest
from hostruntime.wire.sandboxes import SandboxInfo

if TYPE_CHECKING:
    from tests.fakes.host import FakeSandbox


@dataclass
class FakeCommand:
    """One command: how it was started, how it is, and what it has printed since it began."""

    request: StartCommand
    info: CommandInfo
    printed: bytes = b""
    # Where what is kept of that begins.
    first: int = 0


class FakeBackground:
    """Background commands, which run until a test ends them."""

    lock: threading.Condition
    _up: Callable[[], None]
    _running: Callable[[str], FakeSandbox]
    sandbox: Callable[[str], SandboxInfo]

    def __init__(self) -> None:
        self.background: dict[str, dict[str, FakeCommand]] = defaultdict(dict)
        # What the next start raises.
        self.start_fails: HostError | None = None
        self.followers = 0

    def print_more(self, command_id: str, text: bytes) -> None:
        """A command prints something."""
        self._of(command_id).printed += text

    def end_command(
        self,
        command_id: str,
        code: int = 0,
        signal: int | None = None,
        refused: tuple[RefusedRequest, ...] = (),
        active: bool = False,
    ) -> None:
        """A command ends by itself, or by a signal; ``active`` if it leaves something behind."""
        command = self._of(command_id)
        ended = replace(command.info, running=False, active=active, code=code, duration_ms=12)
        ended = replace(ended, refused=refused)
        command.info = replace(ended, signal=signal)

    def _of(self, command_id: str) -> FakeCommand:
        return next(known[command_id] for known in self.background.values() if command_id in known)

    def start_command(self, sandbox_id: str, request: StartCommand) -> CommandInfo:
        """As the client."""
        self._running(sandbox_id)
        failure, self.start_fails = self.start_fails, None
        if failure is not None:
            raise failure
        info = CommandInfo(
            request.id, request.command, 17, running=True, started_at=time.time(), active=True
        )
        self.background[sandbox_id][request.id] = FakeCommand(request, info)
        return info

    def background_commands(self, sandbox_id: str) -> list[CommandInfo]:
        """As the client."""
        self._there(sandbox_id)
        return [command.info for command in reversed(self.background[sandbox_id].values())]

    def command(self, sandbox_id: str, command_id: str) -> CommandInfo:
        """As the client."""
        return self._command(sandbox_id, command_id).info

    def kill_command(self, sandbox_id: str, command_id: str) -> CommandInfo:
        """As the client."""
        command = self._command(sandbox_id, command_id)
        if command.info.running:
            self.end_command(command_id, 143, 15)
            command.info = replace(command.info, killed=True)
        return command.info

    def command_output(
        self, sandbox_id: str, command_id: str, offset: int = 0, *, max_bytes: int | None = None
    ) -> CommandOutput:
        """As the client."""
        command = self._command(sandbox_id, command_id)
        size = len(command.printed)
        start = min(max(offset, command.first), size)
        end = size if max_bytes is None else start + max_bytes
        return CommandOutput(command.printed[start:end], start, size, command.info)

    async def follow_command(
        self, sandbox_id: str, command_id: str, request: FollowCommand
    ) -> AsyncIterator[CommandFrame]:
        """As the client; looks again and again."""
        offset, until = request.offset, time.monotonic() + request.seconds
        self.followers += 1
        try:
            while True:
                part = self.command_output(sandbox_id, command_id, offset)
                if part.data:
                    yield CommandFrame("output", part.data, part.offset)
                    offset = part.offset + len(part.data)
                elif not part.command.running:
                    yield CommandFrame("ended", offset=offset, command=part.command)
                    return
                elif time.monotonic() >= until:
                    yield CommandFrame("timeout", offset=offset, command=part.command)
                    return
                await asyncio.sleep(0.01)
        finally:
            self.followers -= 1

    def _there(self, sandbox_id: str) -> None:
        self._up()
        if self.sandbox(sandbox_id).state != "running":
            raise ContainerGone("The sandbox is not running.")

    def _command(self, sandbox_id: str, command_id: str) -> FakeCommand:
        self._there(sandbox_id)
        try:
            return self.background[sandbox_id][command_id]
        except KeyError:
            raise NotFound(f"There is no command {command_id}.") from None
