"""Commands in a sandbox: what to run, how many may run concurrently, and their results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Base64Bytes, Field

from hostruntime.wire.message import Message

MAX_TIMEOUT_SECONDS = 86_400.0


@dataclass(frozen=True)
class Quota(Message):
    """At most ``most`` concurrent commands of ``scope`` (:mod:`hostruntime.host.quotas`)."""

    scope: Annotated[str, Field(min_length=1, max_length=128)]
    most: Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Exec(Message):
    """``POST /sandboxes/{id}/exec``: a ``command`` for the shell, or an argv as a list.

    ``timeout_seconds`` None is no limit.  At most ``max_output_bytes`` of stdout and stderr
    together are sent; None sends everything.
    """

    command: str | Annotated[Sequence[str], Field(min_length=1)]
    cwd: str = "/workspace"
    env: Mapping[str, str] = field(default_factory=dict)
    timeout_seconds: Annotated[float, Field(gt=0, le=MAX_TIMEOUT_SECONDS)] | None = 60.0
    max_output_bytes: Annotated[int, Field(ge=0)] | None = None
    quota: Quota | None = None


@dataclass(frozen=True)
class RefusedRequest(Message):
    """What the network policy refused a sandbox; ``reason`` is the verdict's code.

    ``direct`` means the proxy was bypassed: the host was looked up by DNS, and ``port`` is 0, or is
    an address that was tried.
    """

    host: str
    port: int
    reason: str
    direct: bool = False


@dataclass(frozen=True)
class ExecFrame(Message):
    """One line of a command's response stream.

    ``kind`` started: ``pid``; chunk: ``stream`` and ``data``; exited: ``code`` (128 + n when signal
    n killed it), ``signal``, ``duration_ms``, ``out_of_memory``, ``truncated``; error:
    ``error_code``, ``message``, ``duration_ms`` and perhaps ``signal``.  The last two end it, and
    tell with ``refused`` what a sandbox was refused while a command ran that failed.
    """

    kind: Literal["started", "chunk", "exited", "error"]
    pid: int | None = None
    stream: str | None = None
    data: Base64Bytes = b""
    code: int | None = None
    signal: int | None = None
    duration_ms: int | None = None
    out_of_memory: bool = False
    truncated: bool = False
    error_code: str | None = None
    message: str | None = None
    refused: tuple[RefusedRequest, ...] = ()

    @property
    def is_last(self) -> bool:
        """Whether it is the last frame."""
        return self.kind in {"exited", "error"}


@dataclass(frozen=True)
class RunningCommands(Message):
    """``GET /commands``: the number of running commands by scope."""

    scopes: Mapping[str, int]


@dataclass(frozen=True)
class ExecResult:
    """The result of a finished command; ``code`` is 128 + n if signal n killed it.

    ``truncated`` means that output beyond the limit was read and discarded (without affecting the
    command); ``out_of_memory`` that the kernel killed something in the container meanwhile;
    ``refused`` is what the network policy refused the sandbox while a command ran that failed.
    """

    code: int
    signal: int | None
    stdout: bytes
    stderr: bytes
    duration_ms: int
    out_of_memory: bool = False
    truncated: bool = False
    pid: int | None = None
    refused: tuple[RefusedRequest, ...] = ()
