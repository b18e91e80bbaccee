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
from orkestr_console.accounts.limits import build_envelope, envelope
from orkestr_console.core.errors import DomainError, ExecKilled, PlanLimit, RateLimited
from orkestr_console.core.hosts import async_host, run_async, translate_error
from orkestr_console.core.postgres import persistently
from orkestr_console.http.closing import cut_off_reason
from sandboxes_app.models import Sandbox
from sandboxes_app.services.lifecycle import find_running, settle_if_missing
from sandboxes_app.specs import ExecSpec

# How much output an error includes, so that a killed command still shows its work.
ERROR_OUTPUT_BYTES = 64 * 1024
# When a refused caller may try again: most commands are short.
RETRY_AFTER_SECONDS = 2
# The frames that end a command's stream.
FINAL_FRAMES = ("exec_exited", "error")
TRUNCATION_NOTICE = (
    "\n[… output past 16 MiB was left out here; write it to a file, and read that in parts …]\n"
)


@dataclass(frozen=True)
class ExecAnswer:
    """A finished command. ``truncated`` means that output past 16 MiB was dropped."""

    stdout: str
    stderr: str
    exit_code: int
    duration_ms: int
    truncated: bool = False


def audit_details(answer: ExecAnswer, _: ExecSpec) -> dict[str, Any]:
    """The audit log's details: not the command, which may contain secrets."""
    return {"exit_code": answer.exit_code, "duration_ms": answer.duration_ms}


@audited("sandbox.exec", "sandbox", note=audit_details)
def exec_command(actor: Actor, sandbox_id: str, spec: ExecSpec) -> ExecAnswer:
    """Run a command to completion.

    Raises ``NotFound``, ``Conflict`` (not running), ``ExecTimeout``, ``ExecKilled``,
    ``RateLimited`` when as many of the team's commands run as its plan allows, ``InvalidInput``
    for a working directory that does not exist.
    """
    actor.require(WRITE)
    sandbox = find_running(actor, sandbox_id)
    try:
        result = run_async(run_to_completion, sandbox, spec, command_quota(actor))
    except host_errors.TooManyCommands as error:
        raise too_many_commands(actor, error) from error
    except host_errors.HostError as error:
        raise translate_exec_error(sandbox, error) from error
    except asyncio.CancelledError:
        record_abandoned(actor, sandbox, cut_off_reason())
        raise
    if result.signal is not None:
        raise killed_error(result)
    return exec_answer(result)


def command_quota(actor: Actor) -> Quota:
    """The team's limit on concurrent commands, for the host, which counts them."""
    return Quota(actor.team.pk, build_envelope(actor.team).value("max_concurrent_commands"))


def too_many_commands(actor: Actor, error: host_errors.TooManyCommands) -> DomainError:
    """The error for one command too many. Reads rows, to say who can raise the limit."""
    try:
        envelope(actor.team).require_room("max_concurrent_commands", error.running)
    except PlanLimit as limit:
        return RateLimited(limit.detail, retry_after=RETRY_AFTER_SECONDS, extra=limit.extra)
    # The limit was raised, just now.
    return RateLimited(error.detail, retry_after=1)


async def run_to_completion(sandbox: Sandbox, spec: ExecSpec, quota: Quota) -> ExecResult:
    """A command's result; kills it if cancelled. Raises the host's errors."""
    return await async_host().exec_to_completion(sandbox.pk, exec_request(sandbox, spec, quota))


def exec_request(sandbox: Sandbox, spec: ExecSpec, quota: Quota) -> Exec:
    """The host's request for a command."""
    return Exec(
        spec.command,
        cwd=spec.cwd,
        env={**sandbox.env, **spec.env},
        timeout_seconds=spec.timeout_seconds,
        quota=quota,
    )


def record_abandoned(actor: Actor, sandbox: Sandbox, reason: str) -> None:
    """Record in the audit log that a command was killed because nobody waits for it."""
    persistently(
        lambda: audit.record(
            actor,
            "sandbox.exec",
            kind="sandbox",
            object_id=sandbox.pk,
            name=sandbox.template_name,
            data={"ended": reason},
        )
    )


def exec_answer(result: ExecResult) -> ExecAnswer:
    """The answer; truncated output says so itself, as not every client shows ``truncated``."""
    printed = {"stdout": decode_output(result.stdout), "stderr": decode_output(result.stderr)}
    if result.truncated:
        truncated_stream = "stdout" if len(result.stdout) >= len(result.stderr) else "stderr"
        printed[truncated_stream] += TRUNCATION_NOTICE
    return ExecAnswer(
        **printed,
        exit_code=result.code,
        duration_ms=result.duration_ms,
        truncated=result.truncated,
    )


def translate_exec_error(sandbox: Sandbox, error: host_errors.HostError) -> DomainError:
    """The domain error for a command that the host ended or refused; corrects the row."""
    if isinstance(error, (host_errors.ContainerGone, host_errors.NotFound)):
        settle_if_missing(sandbox)
        return translate_error(host_errors.ContainerGone(error.detail))
    domain = translate_error(error)
    if isinstance(error, host_errors.ExecTimeout):
        for stream in ("stdout", "stderr"):
            if isinstance(printed := error.extra.get(stream), bytes):
                domain.extra[stream] = decode_output(printed[-ERROR_OUTPUT_BYTES:])
    return domain


def killed_error(result: ExecResult) -> ExecKilled:
    """The error for a command killed by a signal, with its output."""
    number = result.signal or 0
    error = ExecKilled(kill_message(number, memory=result.out_of_memory), signal=number)
    error.extra |= {
        "exit_code": result.code,
        "stdout": decode_output(result.stdout[-ERROR_OUTPUT_BYTES:]),
        "stderr": decode_output(result.stderr[-ERROR_OUTPUT_BYTES:]),
    }
    return error


def kill_message(number: int, *, memory: bool) -> str:
    """The message for a command killed by a signal."""
    if memory:
        return "The command was killed because the sandbox ran out of memory; use a larger size."
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    return f"The command was killed by {name}."


class CommandStream(AsyncGenerator[dict[str, Any]]):
    """The frames of a command. Closing it kills the command, and records why.

    ``why`` is a sentence of who closes it; without one it was the client, or the server's end.
    """

    def __init__(self, frames: AsyncGenerator[dict[str, Any]]) -> None:
        self.close_reason = ""
        self._frames = frames

    @classmethod
    def of(cls, actor: Actor, sandbox: Sandbox, spec: ExecSpec) -> CommandStream:
        """The stream of a command that starts when its first frame is requested."""
        stream = cls(exec_frames(actor, sandbox, spec))
        stream._frames = recording_abandonment(actor, sandbox, stream._frames, stream)
        return stream

    async def asend(self, value: None) -> dict[str, Any]:
        """The next frame."""
        return await self._frames.asend(value)

    async def athrow(self, *error: Any) -> dict[str, Any]:
        """Raise an error inside the underlying generator."""
        return await self._frames.athrow(*error)

    async def aclose(self) -> None:
        """Kill the command, if it is still running."""
        await self._frames.aclose()


@audited("sandbox.exec", "sandbox", note=lambda *_: {"stream": True})
def exec_stream(actor: Actor, sandbox_id: str, spec: ExecSpec) -> CommandStream:
    """Run a command; the frames of the wire contract as they arrive, ``exec_started`` first.

    Closing the iterator early kills the command's process tree; a caller can throw in a
    ``DomainError``, which is recorded as the reason. Raises like :func:`exec_command`, but only
    immediately or before the first frame.
    """
    actor.require(WRITE)
    sandbox = find_running(actor, sandbox_id)
    return CommandStream.of(actor, sandbox, spec)


async def recording_abandonment(
    actor: Actor, sandbox: Sandbox, frames: AsyncGenerator[dict[str, Any]], stream: CommandStream
) -> AsyncGenerator[dict[str, Any]]:
    """The frames; records it, and why, if nobody waited for the last of them."""
    finished = False
    record = database_sync_to_async(record_abandoned)
    try:
        async with aclosing(frames):
            async for frame in frames:
                finished = frame["kind"] in FINAL_FRAMES
                try:
                    yield frame
                except DomainError as error:
                    await record(actor, sandbox, error.detail)
                    raise
    except (GeneratorExit, asyncio.CancelledError):
        # A client that has the last frame often leaves before it learns that there is no other.
        if not finished:
            await asyncio.shield(record(actor, sandbox, stream.close_reason or cut_off_reason()))
        raise


async def exec_frames(
    actor: Actor, sandbox: Sandbox, spec: ExecSpec
) -> AsyncGenerator[dict[str, Any]]:
    """The frames of a command, which starts when the first is requested."""
    quota = await database_sync_to_async(command_quota)(actor)
    started = async_host().exec_frames(sandbox.pk, exec_request(sandbox, spec, quota))
    # An async generator, whatever the client calls it: closing it kills the command.
    frames = cast("AsyncGenerator[ExecFrame]", started)
    boundaries = {"stdout": Utf8Boundaries(), "stderr": Utf8Boundaries()}
    first_frame_seen = False
    try:
        async with aclosing(frames):
            async for frame in frames:
                if not first_frame_seen and frame.kind == "error":
                    raise host_errors.HostError.from_wire(
                        {"code": frame.error_code, "message": frame.message}
                    )
                first_frame_seen = True
                for wire_frame in to_wire(frame, boundaries):
                    yield wire_frame
    except host_errors.TooManyCommands as error:
        # Before any frame: the quota is checked first.
        raise await database_sync_to_async(too_many_commands)(actor, error) from error
    except host_errors.HostError as error:
        domain = await database_sync_to_async(translate_exec_error)(sandbox, error)
        if not first_frame_seen:
            raise domain from error
        yield {"kind": "error", "code": domain.code, "message": domain.detail}


def to_wire(frame: ExecFrame, boundaries: dict[str, Utf8Boundaries]) -> list[dict[str, Any]]:
    """A host's frame as in the wire contract; the last one flushes the held bytes."""
    if frame.kind == "started":
        return [{"kind": "exec_started", "pid": frame.pid}]
    if frame.kind == "chunk":
        stream = frame.stream or "stdout"
        return output_frames(stream, boundaries[stream].feed(frame.data))
    remaining = [
        item for name, part in boundaries.items() for item in output_frames(name, part.flush())
    ]
    return [*remaining, final_frame(frame)]


def output_frames(stream: str, data: bytes) -> list[dict[str, Any]]:
    """A frame of output, or none if it is empty."""
    encoded = base64.b64encode(data).decode("ascii")
    return [{"kind": "exec_chunk", "stream": stream, "data": encoded}] if data else []


def final_frame(frame: ExecFrame) -> dict[str, Any]:
    """The frame that ends the stream."""
    if frame.kind == "error":
        code, message, number = frame.error_code, frame.message, frame.signal
    elif frame.signal is not None:
        number = frame.signal
        code, message = "exec_killed", kill_message(number, memory=frame.out_of_memory)
    else:
        return {"kind": "exec_exited", "code": frame.code, "duration_ms": frame.duration_ms or 0}
    error_frame = {"kind": "error", "code": code, "message": message}
    return error_frame if number is None else {**error_frame, "signal": number}


class Utf8Boundaries:
    """Splits a byte stream between characters: clients decode each UTF-8 chunk on its own."""

    def __init__(self) -> None:
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """The held bytes and ``data``, except for an incomplete last character."""
        data = self._held + data
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(data)
        self._held = decoder.getstate()[0]
        return data[: len(data) - len(self._held)]

    def flush(self) -> bytes:
        """The held bytes."""
        held, self._held = self._held, b""
        return held


def decode_output(data: bytes) -> str:
    """Output as text; invalid UTF-8 is replaced."""
    return data.decode("utf-8", "replace")
