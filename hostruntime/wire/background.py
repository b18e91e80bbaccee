"""Commands that run in the background of a sandbox: starting, watching and ending them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Base64Bytes, Field

from hostruntime.wire.commands import MAX_TIMEOUT_SECONDS, RefusedRequest
from hostruntime.wire.message import Message


@dataclass(frozen=True)
class StartCommand(Message):
    """``POST /sandboxes/{id}/commands``: a command for the shell, by an id of the caller's."""

    id: str
    command: str
    cwd: str = "/workspace"
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CommandInfo(Message):
    """A background command.

    ``pid`` is that inside the sandbox, None until it is known.  ``code`` is 128 + n if signal n
    killed it, and None if nobody saw how it ended; ``killed`` means that somebody asked for it.
    ``active`` means that it runs, or that what it has left behind can still print.  ``refused`` is
    what the network policy refused its sandbox while it ran, if it has failed.
    """

    id: str
    command: str
    pid: int | None
    running: bool
    started_at: float
    active: bool = False
    killed: bool = False
    code: int | None = None
    signal: int | None = None
    out_of_memory: bool = False
    duration_ms: int | None = None
    refused: tuple[RefusedRequest, ...] = ()


@dataclass(frozen=True)
class CommandList(Message):
    """``GET /sandboxes/{id}/commands``: the newest first."""

    commands: tuple[CommandInfo, ...]


@dataclass(frozen=True)
class CommandOutput(Message):
    """``GET /sandboxes/{id}/commands/{command}/output``: a part of what it has printed.

    ``data`` starts at ``offset``, which is after what was asked for where that is not kept any
    more.  ``size`` is how much it has printed so far, in bytes.
    """

    data: Base64Bytes
    offset: int
    size: int
    command: CommandInfo


@dataclass(frozen=True)
class FollowCommand(Message):
    """``POST /sandboxes/{id}/commands/{command}/follow``: its output from ``offset`` on."""

    offset: Annotated[int, Field(ge=0)] = 0
    seconds: Annotated[float, Field(gt=0, le=MAX_TIMEOUT_SECONDS)] = 300.0


@dataclass(frozen=True)
class CommandFrame(Message):
    """One line of the response to :class:`FollowCommand`.

    ``output``: ``data`` at ``offset``, as in :class:`CommandOutput`.  The others are the last:
    ``ended`` has the ``command``, None if its sandbox has ended, too; ``timeout`` means that it
    still runs; ``refused`` has a ``message`` that says why it cannot be followed.
    """

    kind: Literal["output", "ended", "timeout", "refused"]
    data: Base64Bytes = b""
    offset: int = 0
    command: CommandInfo | None = None
    message: str = ""
