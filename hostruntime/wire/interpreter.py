"""Running code in a sandbox's kernels: contexts, and what a run brings forth.

The agent validates what comes from inside a sandbox by the same messages, so their bounds are the
host's protection (:mod:`hostruntime.sandbox.interpreter`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, JsonValue

from hostruntime.wire.commands import MAX_TIMEOUT_SECONDS, Quota
from hostruntime.wire.message import Message

MAX_CODE_CHARACTERS = 1024 * 1024
DEFAULT_LANGUAGE = "python"
Language = Annotated[str, Field(pattern=r"^[a-z][a-z0-9+#._-]{0,31}$")]
_Count = Annotated[int, Field(ge=0, le=2**53)]
_Base64 = Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]*={0,2}$")]


@dataclass(frozen=True)
class CreateContext(Message):
    """``POST /sandboxes/{id}/contexts``: a context, by an id of the caller's."""

    id: str
    language: Language = DEFAULT_LANGUAGE
    cwd: str = "/workspace"


@dataclass(frozen=True)
class ContextInfo(Message):
    """A context: one kernel, and what is known of it.  ``alive`` means that the kernel runs."""

    id: str
    language: str
    cwd: str
    created_at: float
    last_used_at: float | None = None
    executions: int = 0
    alive: bool = True


@dataclass(frozen=True)
class ContextList(Message):
    """``GET /sandboxes/{id}/contexts``: the newest first."""

    contexts: tuple[ContextInfo, ...]


@dataclass(frozen=True)
class RunCode(Message):
    """``POST /sandboxes/{id}/code``: code for a context.

    Without ``context_id`` it is the language's own default one, which is created if necessary; a
    context that is named has its own language.
    """

    code: Annotated[str, Field(max_length=MAX_CODE_CHARACTERS)]
    language: Language = DEFAULT_LANGUAGE
    context_id: str | None = None
    timeout_seconds: Annotated[float, Field(gt=0, le=MAX_TIMEOUT_SECONDS)] = 60.0
    quota: Quota | None = None


@dataclass(frozen=True)
class CodeResult(Message):
    """A value or figure, in each representation that the kernel has of it; ``png`` is base64."""

    text: str | None = None
    html: str | None = None
    svg: str | None = None
    png: _Base64 | None = None
    json: dict[str, JsonValue] | list[JsonValue] | None = None
    chart: dict[str, JsonValue] | None = None


@dataclass(frozen=True)
class CodeError(Message):
    """An exception that the code raised."""

    name: str
    value: str
    traceback: Annotated[tuple[str, ...], Field(max_length=256)] = ()


@dataclass(frozen=True)
class CodeFrame(Message):
    """One line of the response to :class:`RunCode`, and of a bridge's to the agent.

    ``started``: ``context_id``, and ``restarted`` if its kernel had ended and this is another.
    ``stream``: ``text`` that was written to ``stream``.  ``result`` and ``error`` are as they are
    called.  ``done`` is the last: ``interrupted`` at its time limit; ``lost`` says why the kernel
    has ended, if it has; ``truncated`` has what was left out.
    """

    kind: Literal["started", "stream", "result", "error", "done"]
    context_id: str = ""
    restarted: bool = False
    stream: Literal["stdout", "stderr"] = "stdout"
    text: str = ""
    result: CodeResult | None = None
    error: CodeError | None = None
    execution_count: _Count | None = None
    duration_ms: _Count = 0
    interrupted: bool = False
    lost: Annotated[str, Field(max_length=4096)] = ""
    truncated: Annotated[
        tuple[Annotated[str, Field(max_length=64)], ...], Field(max_length=16)
    ] = ()
