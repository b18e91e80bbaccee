"""Commands that run in the background of a sandbox. The host has them; there are no rows."""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from time import monotonic
from typing import Any, cast

from hostruntime import errors as host_errors
from hostruntime.client.host_client import HostClient
from hostruntime.host.patience import scaled
from hostruntime.wire.background import (
    CommandFrame,
    CommandInfo,
    CommandOutput,
    FollowCommand,
    StartCommand,
)
from orkestr_console.accounts.actor import READ, WRITE, Actor
from orkestr_console.accounts.audit import audited
from orkestr_console.core.errors import Conflict, NotFound
from orkestr_console.core.hosts import Steps, ask, async_host, in_steps, translate_error
from orkestr_console.core.ids import is_id, new_id
from orkestr_console.http.threads import in_thread
from sandboxes_app.models import Sandbox, SandboxStatus
from sandboxes_app.services.commands import (
    CommandStream,
    Utf8Boundaries,
    kill_message,
    output_frames,
)
from sandboxes_app.services.lifecycle import (
    find,
    require_allowed,
    require_running,
    settle_if_missing,
)
from sandboxes_app.services.refusals import Refusal, refusal_of
from sandboxes_app.services.waking import find_awake, translate_paused
from sandboxes_app.specs import BackgroundSpec

COMMAND_NOT_FOUND = (
    "The sandbox has no such background command; check the id. The oldest that have ended are "
    "forgotten."
)
MAX_PART_BYTES = 1024 * 1024
# More than any command prints, and a number in every language.
LARGEST_OFFSET = 2**53 - 1
# How long a restart of the host agent may take without those who follow a command noticing.
PATIENCE_SECONDS = 30.0
RETRY_SECONDS = 0.5
# RFC 3629.
CONTINUATION_BYTES, MAX_CHARACTER_BYTES = bytes(range(0x80, 0xC0)), 4
ONE_EACH = "orkestr-one-each"


@in_steps
@audited("command.start", "sandbox", note=lambda info, _: {"command": info.id})
def start_command(actor: Actor, sandbox_id: str, spec: BackgroundSpec) -> Steps[CommandInfo]:
    """Start a command that runs until it ends, is killed, or its sandbox ends.

    Raises ``NotFound``, ``Conflict`` (not running, as many run as may, no space for its output),
    ``InvalidInput`` for a working directory that does not exist.
    """
    actor.require(WRITE)
    sandbox = yield from find_awake.steps(actor, sandbox_id)
    request = StartCommand(
        new_id("cmd"), spec.command, cwd=spec.cwd, env={**sandbox.env, **spec.env}
    )
    return (yield from answer(sandbox, start_awake(actor, sandbox, request)))


def start_awake(actor: Actor, sandbox: Sandbox, request: StartCommand) -> Steps[CommandInfo]:
    """Have the host start it. Raises the host's errors, and ``Asleep``: it was paused just now."""
    try:
        return (yield from ask(HostClient.start_command, sandbox.pk, request))
    except host_errors.ContainerPaused as error:
        if (paused := translate_paused(actor, sandbox, error)) is not None:
            raise paused from error
        raise


@in_steps
def list_commands(actor: Actor, sandbox_id: str) -> Steps[list[CommandInfo]]:
    """A sandbox's background commands, the newest first, also while it is paused.

    Raises ``NotFound``, ``Conflict`` (the sandbox has ended).
    """
    actor.require(READ)
    sandbox = yield from find_existing(actor, sandbox_id)
    return (yield from answer(sandbox, ask(HostClient.background_commands, sandbox.pk)))


@in_steps
def get_command(actor: Actor, sandbox_id: str, command_id: str) -> Steps[CommandInfo]:
    """One background command. Raises like :func:`list_commands`."""
    actor.require(READ)
    sandbox = yield from find_existing(actor, sandbox_id, command_id)
    return (yield from answer(sandbox, ask(HostClient.command, sandbox.pk, command_id)))


@in_steps
@audited("command.kill", "sandbox", note=lambda info, _: {"command": info.id})
def kill_command(actor: Actor, sandbox_id: str, command_id: str) -> Steps[CommandInfo]:
    """Kill a command and all that it has started; one that has ended stays as it is.

    SIGTERM, then after two seconds SIGKILL. Raises like :func:`list_commands`.
    """
    actor.require(WRITE)
    sandbox = yield from find_existing(actor, sandbox_id, command_id)
    return (yield from answer(sandbox, ask(HostClient.kill_command, sandbox.pk, command_id)))


@dataclass(frozen=True)
class CommandLogs:
    """A part of a command's output, cut between characters.

    In UTF-8 ``content`` has exactly the bytes from ``offset`` to ``next_offset``: a byte that is no
    character is a question mark. ``dropped`` bytes before it are not kept any more; ``truncated``
    means that there is more after it.
    """

    content: str
    offset: int
    size: int
    dropped: int
    truncated: bool
    command: CommandInfo

    @property
    def next_offset(self) -> int:
        """Where the next part begins."""
        return self.offset + len(self.content.encode())


@in_steps
def read_logs(
    actor: Actor, sandbox_id: str, command_id: str, offset: int, max_bytes: int | None = None
) -> Steps[CommandLogs]:
    """What a command has printed from ``offset`` on; only the last 4 MiB or so are kept.

    At most ``max_bytes``; by default a mebibyte, but all that is kept where ``offset`` is not: the
    official SDK goes on at its own offset, and would get the same again and again. Raises like
    :func:`list_commands`.
    """
    actor.require(READ)
    sandbox = yield from find_existing(actor, sandbox_id, command_id)

    def read(most: int | None) -> Steps[CommandOutput]:
        return ask(HostClient.command_output, sandbox.pk, command_id, offset, max_bytes=most)

    part = yield from answer(sandbox, read(max_bytes or MAX_PART_BYTES))
    if part.offset > offset and max_bytes is None:
        part = yield from answer(sandbox, read(None))
    return command_logs(part, offset)


@in_steps
def read_last_logs(
    actor: Actor, sandbox_id: str, command_id: str, max_bytes: int
) -> Steps[CommandLogs]:
    """The last ``max_bytes`` that a command has printed; raises like :func:`list_commands`.

    ``dropped`` is how many bytes there were before them, kept or not.
    """
    actor.require(READ)
    sandbox = yield from find_existing(actor, sandbox_id, command_id)

    def read(offset: int, most: int) -> Steps[CommandOutput]:
        return ask(HostClient.command_output, sandbox.pk, command_id, offset, max_bytes=most)

    end = yield from answer(sandbox, read(LARGEST_OFFSET, 0))
    return command_logs(
        (yield from answer(sandbox, read(max(end.size - max_bytes, 0), max_bytes))), 0
    )


def command_logs(part: CommandOutput, asked: int) -> CommandLogs:
    """A part of the output as text."""
    data, offset = part.data, part.offset
    dropped = max(offset - asked, 0)
    if dropped:
        # What is kept may begin within a character.
        begun = len(data) - len(data.lstrip(CONTINUATION_BYTES))
        if begun < MAX_CHARACTER_BYTES:
            data, offset = data[begun:], offset + begun
    more = part.offset + len(part.data) < part.size
    decoder = codecs.getincrementaldecoder("utf-8")(ONE_EACH)
    content = decoder.decode(data, final=not more and not part.command.running)
    return CommandLogs(content, offset, part.size, dropped, truncated=more, command=part.command)


def one_question_mark_each(error: UnicodeError) -> tuple[str, int]:
    """An error handler of the codecs: a byte that is no character becomes one that is."""
    assert isinstance(error, UnicodeDecodeError)
    return "?" * (error.end - error.start), error.end


codecs.register_error(ONE_EACH, one_question_mark_each)


@dataclass(frozen=True)
class Following:
    """A command whose output may be followed: by whom, from where on, and for how long."""

    actor: Actor
    sandbox: Sandbox
    command: CommandInfo
    offset: int
    seconds: float


@in_steps
def begin_following(
    actor: Actor, sandbox_id: str, command_id: str, offset: int, seconds: float
) -> Steps[Following]:
    """The first part of following a command, which reads rows. Raises like :func:`list_commands`.

    ``seconds`` is how long it may take, in total.
    """
    actor.require(READ)
    sandbox = yield from find_existing(actor, sandbox_id, command_id)
    command = yield from answer(sandbox, ask(HostClient.command, sandbox.pk, command_id))
    return Following(actor, sandbox, command, offset, seconds)


def started_frame(following: Following) -> dict[str, Any]:
    """The first frame of the wire contract, which comes before those of :func:`follow`."""
    return {"kind": "exec_started", "pid": following.command.pid or 0}


def follow(following: Following) -> CommandStream:
    """The frames of the wire contract as the command prints, but for the first.

    On the event loop, where it holds neither a thread nor a database connection. Closing it does
    nothing to the command.
    """
    return CommandStream(follow_frames(following))


async def follow_frames(following: Following) -> AsyncGenerator[dict[str, Any]]:
    """The frames of :func:`follow`. A restart of the host agent is waited for."""
    boundaries, offset = Utf8Boundaries(), following.offset
    until = monotonic() + following.seconds
    patient_until = 0.0
    while True:
        remaining = max(until - monotonic(), 0.1)
        try:
            async with aclosing(host_frames(following, offset, remaining)) as frames:
                async for frame in frames:
                    patient_until = 0.0
                    refusal = None
                    if frame.command is not None and frame.command.refused:
                        refusal = await in_thread(refusal_of, following.actor, frame.command)
                    for wire_frame in to_wire(frame, offset, boundaries, refusal):
                        yield wire_frame
                    offset = frame.offset + len(frame.data)
                    if frame.kind != "output":
                        return
        except host_errors.HostUnavailable as error:
            patient_until = patient_until or monotonic() + scaled(PATIENCE_SECONDS)
            if monotonic() >= min(patient_until, until):
                yield error_frame(translate_error(error).code, error.detail)
                return
            await asyncio.sleep(RETRY_SECONDS)
        except (host_errors.ContainerGone, host_errors.NotFound):
            yield ended_frame(None)
            return
        except host_errors.HostError as error:
            yield error_frame(error.code, error.detail)
            return


def host_frames(following: Following, offset: int, seconds: float) -> AsyncGenerator[CommandFrame]:
    """The host's frames. An async generator, whatever the client calls it."""
    request = FollowCommand(offset, seconds)
    frames = async_host().follow_command(following.sandbox.pk, following.command.id, request)
    return cast("AsyncGenerator[CommandFrame]", frames)


def to_wire(
    frame: CommandFrame, expected: int, boundaries: Utf8Boundaries, refusal: Refusal | None = None
) -> Iterator[dict[str, Any]]:
    """A host's frame as in the wire contract; ``expected`` is the offset that it should have."""
    if frame.kind == "output":
        if (dropped := frame.offset - expected) > 0:
            notice = f"\n[… {dropped:,} bytes of output are not kept any more …]\n"
            yield from output_frames("stdout", boundaries.flush() + notice.encode())
        yield from output_frames("stdout", boundaries.feed(frame.data))
        return
    yield from output_frames("stdout", boundaries.flush())
    if frame.kind == "timeout":
        yield error_frame(
            "exec_timeout",
            "The command still runs; this was only as long as it was to be followed. Follow it "
            f"again from offset {frame.offset}.",
        )
    else:
        ended = ended_frame(frame.command)
        if refusal is not None:
            ended |= refusal.members
            if ended["kind"] == "error":
                ended["message"] = f"{ended['message']} {refusal.message}"
            else:
                yield from output_frames("stderr", refusal.notice.encode())
        yield ended


def ended_frame(command: CommandInfo | None) -> dict[str, Any]:
    """The last frame of a command that has ended; None if its sandbox has, too."""
    if command is None or (command.code is None and not command.killed):
        return error_frame("exec_killed", "The command was killed, as its sandbox ended.")
    if command.signal is not None:
        message = kill_message(command.signal, memory=command.out_of_memory)
        return {**error_frame("exec_killed", message), "signal": command.signal}
    if command.killed:
        return error_frame("exec_killed", "The command was killed on request.")
    return {
        "kind": "exec_exited",
        "code": command.code,
        "duration_ms": command.duration_ms or 0,
    }


def error_frame(code: str, message: str) -> dict[str, Any]:
    """A frame that ends the stream."""
    return {"kind": "error", "code": code, "message": message}


def find_existing(actor: Actor, sandbox_id: str, command_id: str | None = None) -> Steps[Sandbox]:
    """The row of a sandbox that runs or is paused.

    Raises ``NotFound`` (also for what is not a command's id), ``Conflict``, and ``Forbidden`` for a
    token that is not for its network or template.
    """
    sandbox = yield from find.steps(actor, sandbox_id)
    require_allowed(actor, sandbox)
    if sandbox.status != SandboxStatus.PAUSED:
        require_running(sandbox)
    if command_id is not None and not is_id("cmd", command_id):
        raise NotFound(COMMAND_NOT_FOUND, code="command_not_found")
    return sandbox


def answer[R](sandbox: Sandbox, call: Steps[R]) -> Steps[R]:
    """The host's answer about a sandbox's commands; translates its errors, and corrects the row."""
    try:
        return (yield from call)
    except host_errors.ContainerGone as error:
        yield from settle_if_missing.steps(sandbox)
        raise translate_error(error) from error
    except host_errors.NotFound as error:
        # Either the command, or the container itself.
        if (yield from settle_if_missing.steps(sandbox)):
            raise translate_error(host_errors.ContainerGone(error.detail)) from error
        raise NotFound(COMMAND_NOT_FOUND, code="command_not_found") from error
    except host_errors.TooManyCommands as error:
        raise Conflict(error.detail, code="too_many_commands") from error
    except host_errors.HostError as error:
        raise translate_error(error) from error
