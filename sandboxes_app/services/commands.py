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

from hostruntime import errors as host_errors
from hostruntime.wire.commands import Exec, ExecFrame, ExecResult, Quota
from orkestr_console.accounts import audit
from orkestr_console.accounts.actor import WRITE, Actor
from orkestr_console.accounts.audit import audited
from orkestr_console.accounts.limits import envelope, limit_of
from orkestr_console.core.errors import Asleep, DomainError, ExecKilled, PlanLimit, RateLimited
from orkestr_console.core.hosts import async_host, run_async
from orkestr_console.core.postgres import persistently
from orkestr_console.http.closing import cut_off_reason
from orkestr_console.http.threads import in_thread
from sandboxes_app.models import Sandbox
from sandboxes_app.services.exec_errors import (
    ERROR_OUTPUT_BYTES,
    decode_output,
    translate_exec_error,
)
from sandboxes_app.services.refusals import Refusal, describe_refusal
from sandboxes_app.services.waking import find_awake, translate_paused
from sandboxes_app.specs import ExecSpec

# When a refused caller may try again: most commands are short.
RETRY_AFTER_SECONDS = 2
# The frames that end a command's stream.
FINAL_FRAMES = ("exec_exited", "error")
TRUNCATION_NOTICE = (
    "\n[… output past 16 MiB was left out here; write it to a file, and read that in parts …]\n"
)


@dataclass(frozen=True)
class ExecAnswer:
    """A finished command. ``truncated`` means that output past 16 MiB was dropped.

    ``refusal`` is what the network policy refused while it ran, if it failed.
    """

    stdout: str
    stderr: str
    exit_code: int
    duration_ms: int
    truncated: bool = False
    refusal: Refusal | None = None


def audit_details(answer: ExecAnswer, _: Outcome) -> dict[str, Any]:
    """The audit log's details: not the command, which may contain secrets."""
    return {"exit_code": answer.exit_code, "duration_ms": answer.duration_ms}


def exec_command(actor: Actor, sandbox_id: str, spec: ExecSpec) -> ExecAnswer:
    """Run a command to completion; keeps the caller's thread meanwhile.

    Raises ``NotFound``, ``Conflict`` (not running), ``ExecTimeout``, ``ExecKilled``,
    ``RateLimited`` when as many of the team's commands run as its plan allows, ``InvalidInput``
    for a working directory that does not exist.
    """
    try:
        command = prepare_command(actor, sandbox_id, spec)
    except Asleep as asleep:
        run_async(asleep.wake)
        command = prepare_command(actor, sandbox_id, spec)
    return conclude_command(command, run_async(run_command, command))


@dataclass(frozen=True)
class Command:
    """A command that may be run: who runs it, where, and the host's request for it."""

    actor: Actor
    sandbox: Sandbox
    request: Exec


type Outcome = ExecResult | host_errors.HostError


@audited("sandbox.exec", "sandbox")
def prepare_command(actor: Actor, sandbox_id: str, spec: ExecSpec) -> Command:
    """The first part of running a command, which reads rows. Raises like :func:`exec_command`."""
    actor.require(WRITE)
    sandbox = find_awake(actor, sandbox_id)
    return Command(actor, sandbox, exec_request(sandbox, spec, command_quota(actor)))


async def run_command(command: Command) -> Outcome:
    """The second part, on the event loop: it holds neither a thread nor a database connection.

    Returns the host's errors. If it is cancelled, the command is killed, which is recorded.
    """
    try:
        return await async_host().exec_to_completion(command.sandbox.pk, command.request)
    except host_errors.HostError as error:
        return error
    except asyncio.CancelledError:
        reason = cut_off_reason()
        await asyncio.shield(in_thread(record_abandoned, command.actor, command.sandbox, reason))
        raise


def conclude_command(command: Command, outcome: Outcome) -> ExecAnswer:
    """The last part, which records the outcome. Raises like :func:`exec_command`."""
    return _conclude(command.actor, command.sandbox.pk, command.sandbox, outcome)


@audited("sandbox.exec", "sandbox", note=audit_details, behind=True)
def _conclude(actor: Actor, _: str, sandbox: Sandbox, outcome: Outcome) -> ExecAnswer:
    if isinstance(outcome, host_errors.TooManyCommands):
        raise too_many_commands(actor, outcome) from outcome
    if isinstance(outcome, host_errors.HostError):
        paused = translate_paused(actor, sandbox, outcome)
        raise paused or translate_exec_error(sandbox, outcome) from outcome
    refusal = describe_refusal(actor.team, outcome.refused)
    if outcome.signal is not None:
        raise killed_error(outcome, refusal)
    return exec_answer(outcome, refusal)


def command_quota(actor: Actor) -> Quota:
    """The team's limit on concurrent commands, for the host, which counts them."""
    return Quota(actor.team.pk, limit_of(actor.team, "max_concurrent_commands"))


def too_many_commands(actor: Actor, error: host_errors.TooManyCommands) -> DomainError:
    """The error for one command too many. Reads rows, to say who can raise the limit."""
    try:
        envelope(actor.team).require_room("max_concurrent_commands", error.running)
    except PlanLimit as limit:
        return RateLimited(limit.detail, retry_after=RETRY_AFTER_SECONDS, extra=limit.extra)
    # The limit was raised, just now.
    return RateLimited(error.detail, retry_after=1)


def exec_request(sandbox: Sandbox, spec: ExecSpec, quota: Quota) -> Exec:
    """The host's request for a command."""
    return Exec(
        spec.command,
        cwd=spec.cwd,
        env={**sandbox.env, **spec.env},
        timeout_seconds=spec.timeout_seconds,
        quota=quota,
    )


def record_abandoned(
    actor: Actor, sandbox: Sandbox, reason: str, action: str = "sandbox.exec"
) -> None:
    """Record in the audit log that a command was killed because nobody waits for it."""
    persistently(
        lambda: audit.record(
            actor,
            action,
            kind="sandbox",
            object_id=sandbox.pk,
            name=sandbox.template_name,
            data={"ended": reason},
        )
    )


def exec_answer(result: ExecResult, refusal: Refusal | None = None) -> ExecAnswer:
    """The answer; truncated output says so itself, as not every client shows ``truncated``.

    So does what was refused.
    """
    printed = {"stdout": decode_output(result.stdout), "stderr": decode_output(result.stderr)}
    if result.truncated:
        truncated_stream = "stdout" if len(result.stdout) >= len(result.stderr) else "stderr"
        printed[truncated_stream] += TRUNCATION_NOTICE
    if refusal is not None:
        printed["stderr"] += refusal.notice
    return ExecAnswer(
        **printed,
        exit_code=result.code,
        duration_ms=result.duration_ms,
        truncated=result.truncated,
        refusal=refusal,
    )


def killed_error(result: ExecResult, refusal: Refusal | None = None) -> ExecKilled:
    """The error for a command killed by a signal, with its output."""
    number = result.signal or 0
    message = kill_message(number, memory=result.out_of_memory)
    error = ExecKilled(f"{message} {refusal.message}" if refusal else message, signal=number)
    error.extra |= {"refused_hosts": list(refusal.hosts)} if refusal else {}
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
    def of(cls, command: Command) -> CommandStream:
        """The stream of a command that starts when its first frame is requested."""
        stream = cls(exec_frames(command))
        stream._frames = recording_abandonment(command, stream._frames, stream)
        return stream

    def error_frame(self, code: str, detail: str) -> dict[str, Any]:
        """The frame that ends the stream with an error of the service's."""
        return {"kind": "error", "code": code, "message": detail}

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
    sandbox = find_awake(actor, sandbox_id)
    request = exec_request(sandbox, spec, command_quota(actor))
    return CommandStream.of(Command(actor, sandbox, request))


async def recording_abandonment(
    command: Command, frames: AsyncGenerator[dict[str, Any]], stream: CommandStream
) -> AsyncGenerator[dict[str, Any]]:
    """The frames; records it, and why, if nobody waited for the last of them."""
    finished = False

    async def record(reason: str) -> None:
        await in_thread(record_abandoned, command.actor, command.sandbox, reason)

    try:
        async with aclosing(frames):
            async for frame in frames:
                finished = frame["kind"] in FINAL_FRAMES
                try:
                    yield frame
                except DomainError as error:
                    await record(error.detail)
                    raise
    except (GeneratorExit, asyncio.CancelledError):
        # A client that has the last frame often leaves before it learns that there is no other.
        if not finished:
            await asyncio.shield(record(stream.close_reason or cut_off_reason()))
        raise


async def exec_frames(command: Command) -> AsyncGenerator[dict[str, Any]]:
    """The frames of a command, which starts when the first is requested."""
    started = async_host().exec_frames(command.sandbox.pk, command.request)
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
                refusal = None
                if frame.refused:
                    team = command.actor.team
                    refusal = await in_thread(describe_refusal, team, frame.refused)
                for wire_frame in to_wire(frame, boundaries, refusal):
                    yield wire_frame
    except host_errors.TooManyCommands as error:
        # Before any frame: the quota is checked first.
        raise await in_thread(too_many_commands, command.actor, error) from error
    except host_errors.HostError as error:
        paused = translate_paused(command.actor, command.sandbox, error)
        if paused and not first_frame_seen:
            raise paused from error
        domain = await in_thread(translate_exec_error, command.sandbox, error)
        if not first_frame_seen:
            raise domain from error
        yield {"kind": "error", "code": domain.code, "message": domain.detail}


def to_wire(
    frame: ExecFrame, boundaries: dict[str, Utf8Boundaries], refusal: Refusal | None = None
) -> list[dict[str, Any]]:
    """A host's frame as in the wire contract; the last one flushes the held bytes."""
    if frame.kind == "started":
        return [{"kind": "exec_started", "pid": frame.pid}]
    if frame.kind == "chunk":
        stream = frame.stream or "stdout"
        return output_frames(stream, boundaries[stream].feed(frame.data))
    remaining = [
        item for name, part in boundaries.items() for item in output_frames(name, part.flush())
    ]
    if refusal is not None and frame.kind == "exited":
        remaining += output_frames("stderr", refusal.notice.encode())
    return [*remaining, final_frame(frame, refusal)]


def output_frames(stream: str, data: bytes) -> list[dict[str, Any]]:
    """A frame of output, or none if it is empty."""
    encoded = base64.b64encode(data).decode("ascii")
    return [{"kind": "exec_chunk", "stream": stream, "data": encoded}] if data else []


def final_frame(frame: ExecFrame, refusal: Refusal | None = None) -> dict[str, Any]:
    """The frame that ends the stream."""
    refused = refusal.members if refusal else {}
    if frame.kind == "error":
        code, message, number = frame.error_code, frame.message, frame.signal
    elif frame.signal is not None:
        number = frame.signal
        code, message = "exec_killed", kill_message(number, memory=frame.out_of_memory)
    else:
        exited = {"kind": "exec_exited", "code": frame.code}
        return {**exited, "duration_ms": frame.duration_ms or 0, **refused}
    if refusal is not None:
        message = f"{message} {refusal.message}"
    error_frame = {"kind": "error", "code": code, "message": message, **refused}
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
