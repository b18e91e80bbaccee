"""Running commands in a sandbox."""

from __future__ import annotations

import asyncio
import base64
import codecs
import signal
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, cast

from channels.db import database_sync_to_async

from hostruntime import errors as host_errors
from hostruntime.wire.commands import Exec, ExecFrame, ExecResult, Quota
from orkestr_console.accounts import audit
from orkestr_console.accounts.actor import WRITE, Actor
from orkestr_console.accounts.audit import audited
from orkestr_console.accounts.limits import build, envelope
from orkestr_console.core.errors import DomainError, ExecKilled, PlanLimit, RateLimited
from orkestr_console.core.hosts import async_host, awaited, told
from orkestr_console.core.postgres import persistently
from orkestr_console.http.closing import why_cut_off
from sandboxes_app.models import Sandbox
from sandboxes_app.services.lifecycle import find_running, settle_if_gone
from sandboxes_app.specs import ExecSpec

# What an error repeats of the output, so that a command that was stopped still shows its work.
KEPT_OUTPUT = 64 * 1024
# When one that was refused may try again: commands are short, most of them.
BUSY_SECONDS = 2
# The frames that a command's stream ends with.
LAST = ("exec_exited", "error")
LEFT_OUT = (
    "\n[… output past 16 MiB was left out here; write it to a file, and read that in parts …]\n"
)


@dataclass(frozen=True)
class ExecAnswer:
    """A command that ended. ``truncated`` says that output past 16 MiB was dropped."""

    stdout: str
    stderr: str
    exit_code: int
    duration_ms: int
    truncated: bool = False


def noted(answer: ExecAnswer, _: ExecSpec) -> dict[str, Any]:
    """What the audit log keeps: not the command, which may hold secrets."""
    return {"exit_code": answer.exit_code, "duration_ms": answer.duration_ms}


@audited("sandbox.exec", "sandbox", note=noted)
def exec_command(actor: Actor, sandbox_id: str, spec: ExecSpec) -> ExecAnswer:
    """Run a command to its end.

    Raises ``NotFound``, ``Conflict`` (not running), ``ExecTimeout``, ``ExecKilled``,
    ``RateLimited`` when as many of the team's commands run as its plan allows, ``InvalidInput``
    for a working directory that does not exist.
    """
    actor.require(WRITE)
    sandbox = find_running(actor, sandbox_id)
    try:
        result = awaited(to_the_end, sandbox, spec, quota_of(actor))
    except host_errors.TooManyCommands as error:
        raise too_many(actor, error) from error
    except host_errors.HostError as error:
        raise refused(sandbox, error) from error
    except asyncio.CancelledError:
        note_abandoned(actor, sandbox, why_cut_off())
        raise
    if result.signal is not None:
        raise killed(result)
    return answered(result)


def quota_of(actor: Actor) -> Quota:
    """How many commands the actor's team may run at once: the host that runs them counts them."""
    return Quota(actor.team.pk, build(actor.team).value("max_concurrent_commands"))


def too_many(actor: Actor, error: host_errors.TooManyCommands) -> DomainError:
    """The error for a command that is one too many. Reads rows, to say whom to ask for more."""
    try:
        envelope(actor.team).require_room("max_concurrent_commands", error.running)
    except PlanLimit as limit:
        return RateLimited(limit.detail, retry_after=BUSY_SECONDS, extra=limit.extra)
    # The limit was raised, just now.
    return RateLimited(error.detail, retry_after=1)


async def to_the_end(sandbox: Sandbox, spec: ExecSpec, quota: Quota) -> ExecResult:
    """What came of a command; cancelled, it ends it. Raises the host's errors."""
    return await async_host().exec_to_completion(sandbox.pk, asked(sandbox, spec, quota))


def asked(sandbox: Sandbox, spec: ExecSpec, quota: Quota) -> Exec:
    """What the host is to run."""
    return Exec(
        spec.command,
        cwd=spec.cwd,
        env={**sandbox.env, **spec.env},
        timeout_seconds=spec.timeout_seconds,
        quota=quota,
    )


def note_abandoned(actor: Actor, sandbox: Sandbox, why: str) -> None:
    """Nobody waits for a command any more, and it was ended: put that on record."""
    persistently(
        lambda: audit.record(
            actor,
            "sandbox.exec",
            kind="sandbox",
            object_id=sandbox.pk,
            name=sandbox.template_name,
            data={"ended": why},
        )
    )


def answered(result: ExecResult) -> ExecAnswer:
    """The answer; output that was cut says so itself, as not every client shows ``truncated``."""
    printed = {"stdout": text(result.stdout), "stderr": text(result.stderr)}
    if result.truncated:
        cut = "stdout" if len(result.stdout) >= len(result.stderr) else "stderr"
        printed[cut] += LEFT_OUT
    return ExecAnswer(
        **printed,
        exit_code=result.code,
        duration_ms=result.duration_ms,
        truncated=result.truncated,
    )


def refused(sandbox: Sandbox, error: host_errors.HostError) -> DomainError:
    """The domain error for a command that did not end by itself; the row is put right."""
    if isinstance(error, (host_errors.ContainerGone, host_errors.NotFound)):
        settle_if_gone(sandbox)
        return told(host_errors.ContainerGone(error.detail))
    domain = told(error)
    if isinstance(error, host_errors.ExecTimeout):
        for stream in ("stdout", "stderr"):
            if isinstance(printed := error.extra.get(stream), bytes):
                domain.extra[stream] = text(printed[-KEPT_OUTPUT:])
    return domain


def killed(result: ExecResult) -> ExecKilled:
    """The error for a command that a signal ended, with what it had printed."""
    number = result.signal or 0
    error = ExecKilled(killed_by(number, memory=result.out_of_memory), signal=number)
    error.extra |= {
        "exit_code": result.code,
        "stdout": text(result.stdout[-KEPT_OUTPUT:]),
        "stderr": text(result.stderr[-KEPT_OUTPUT:]),
    }
    return error


def killed_by(number: int, *, memory: bool) -> str:
    """The sentence for it."""
    if memory:
        return "The command was killed because the sandbox ran out of memory; use a larger size."
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    return f"The command was killed by {name}."


class CommandStream(AsyncGenerator[dict[str, Any]]):
    """The frames of a command. Closing it ends the command, and puts on record why.

    ``why`` is a sentence of who closes it; without one it was the client, or the server's end.
    """

    def __init__(self, frames: AsyncGenerator[dict[str, Any]]) -> None:
        self.why = ""
        self._frames = frames

    @classmethod
    def of(cls, actor: Actor, sandbox: Sandbox, spec: ExecSpec) -> CommandStream:
        """The stream of a command that starts when its first frame is asked for."""
        stream = cls(frames_of(actor, sandbox, spec))
        stream._frames = noted_if_abandoned(actor, sandbox, stream._frames, stream)
        return stream

    async def asend(self, value: None) -> dict[str, Any]:
        """The next frame."""
        return await self._frames.asend(value)

    async def athrow(self, *error: Any) -> dict[str, Any]:
        """Raise an error where the frames come from."""
        return await self._frames.athrow(*error)

    async def aclose(self) -> None:
        """End the command, if it has not ended."""
        await self._frames.aclose()


@audited("sandbox.exec", "sandbox", note=lambda *_: {"stream": True})
def exec_stream(actor: Actor, sandbox_id: str, spec: ExecSpec) -> CommandStream:
    """Run a command; the frames of the wire contract as they come, ``exec_started`` first.

    Close the iterator early and the command's process tree is killed; who has had enough of it
    throws a ``DomainError`` in, which goes on record as why. Raises like :func:`exec_command`, but
    only at once or before the first frame.
    """
    actor.require(WRITE)
    sandbox = find_running(actor, sandbox_id)
    return CommandStream.of(actor, sandbox, spec)


async def noted_if_abandoned(
    actor: Actor, sandbox: Sandbox, frames: AsyncGenerator[dict[str, Any]], stream: CommandStream
) -> AsyncGenerator[dict[str, Any]]:
    """The frames; that nobody waited for the last of them is put on record, and why."""
    ended = False
    note = database_sync_to_async(note_abandoned)
    try:
        async with aclosing(frames):
            async for frame in frames:
                ended = frame["kind"] in LAST
                try:
                    yield frame
                except DomainError as error:
                    await note(actor, sandbox, error.detail)
                    raise
    except (GeneratorExit, asyncio.CancelledError):
        # One that has had the last frame often leaves before it hears that there is no other.
        if not ended:
            await asyncio.shield(note(actor, sandbox, stream.why or why_cut_off()))
        raise


async def frames_of(
    actor: Actor, sandbox: Sandbox, spec: ExecSpec
) -> AsyncGenerator[dict[str, Any]]:
    """The frames of a command, which starts when the first is asked for."""
    quota = await database_sync_to_async(quota_of)(actor)
    started = async_host().exec_frames(sandbox.pk, asked(sandbox, spec, quota))
    # An async generator, whatever the client calls it: closing it ends the command.
    frames = cast("AsyncGenerator[ExecFrame]", started)
    whole = {"stdout": WholeCharacters(), "stderr": WholeCharacters()}
    begun = False
    try:
        async with aclosing(frames):
            async for frame in frames:
                if not begun and frame.kind == "error":
                    raise host_errors.HostError.from_wire(
                        {"code": frame.error_code, "message": frame.message}
                    )
                begun = True
                for shown in to_wire(frame, whole):
                    yield shown
    except host_errors.TooManyCommands as error:
        # Before any frame: it is the first thing that is looked at.
        raise await database_sync_to_async(too_many)(actor, error) from error
    except host_errors.HostError as error:
        domain = await database_sync_to_async(refused)(sandbox, error)
        if not begun:
            raise domain from error
        yield {"kind": "error", "code": domain.code, "message": domain.detail}


def to_wire(frame: ExecFrame, whole: dict[str, WholeCharacters]) -> list[dict[str, Any]]:
    """A host's frame in the words of the wire contract; the last one lets go of what was held."""
    if frame.kind == "started":
        return [{"kind": "exec_started", "pid": frame.pid}]
    if frame.kind == "chunk":
        stream = frame.stream or "stdout"
        return chunk(stream, whole[stream].feed(frame.data))
    held = [item for name, part in whole.items() for item in chunk(name, part.rest())]
    return [*held, last(frame)]


def chunk(stream: str, data: bytes) -> list[dict[str, Any]]:
    """A frame of output, unless there is none."""
    encoded = base64.b64encode(data).decode("ascii")
    return [{"kind": "exec_chunk", "stream": stream, "data": encoded}] if data else []


def last(frame: ExecFrame) -> dict[str, Any]:
    """The frame that ends the stream."""
    if frame.kind == "error":
        code, message, number = frame.error_code, frame.message, frame.signal
    elif frame.signal is not None:
        number = frame.signal
        code, message = "exec_killed", killed_by(number, memory=frame.out_of_memory)
    else:
        return {"kind": "exec_exited", "code": frame.code, "duration_ms": frame.duration_ms or 0}
    ended = {"kind": "error", "code": code, "message": message}
    return ended if number is None else {**ended, "signal": number}


class WholeCharacters:
    """Cuts a byte stream between characters: clients decode each chunk of UTF-8 by itself."""

    def __init__(self) -> None:
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """``data`` after what was held back, but for a last character that is not whole."""
        data = self._held + data
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(data)
        self._held = decoder.getstate()[0]
        return data[: len(data) - len(self._held)]

    def rest(self) -> bytes:
        """What was held back."""
        held, self._held = self._held, b""
        return held


def text(data: bytes) -> str:
    """Output as text: what is not UTF-8 is replaced."""
    return data.decode("utf-8", "replace")
