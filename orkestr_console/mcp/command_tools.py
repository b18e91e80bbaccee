"""The tools for commands: those that are waited for, and those that run in the background."""

from __future__ import annotations

import base64
from contextlib import aclosing
from typing import Annotated, Any

from pydantic import Field

from hostruntime.wire.background import CommandInfo
from orkestr_console.accounts.actor import Actor
from orkestr_console.core.errors import (
    Conflict,
    DomainError,
    ExecKilled,
    ExecTimeout,
    HostUnavailable,
)
from orkestr_console.mcp.arguments import Brief, Default, Without
from orkestr_console.mcp.lists import fitting
from orkestr_console.mcp.output import TruncatedOutput
from orkestr_console.mcp.results import (
    MAX_COMMAND,
    BackgroundCommand,
    BackgroundDetail,
    CommandOutput,
    ExecResult,
    Rows,
)
from orkestr_console.mcp.tool import (
    MAX_CHARACTERS,
    Ctx,
    call_service,
    read_tool,
    write_tool,
)
from orkestr_console.mcp.using import SandboxId, Use, using
from sandboxes_app import presenters, services
from sandboxes_app.specs import BackgroundSpec, ExecSpec

# Many clients give up after a minute; a command that is stopped has two seconds more.
DEFAULT_SECONDS, MAX_WAIT_SECONDS = 50, 50
# A character's (RFC 3629), or there would be no progress.
LEAST_BYTES = 4
# In bytes. A command that prints more is stopped: nobody reads that much through a tool.
MAX_OUTPUT = 64 * 1024 * 1024
TOO_MUCH_OUTPUT = (
    "The command was stopped because it printed more than 64 MiB. Redirect its output to a file "
    "and read that in parts."
)

CommandId = Annotated[str, Field(description="")]
WORDS = Brief(command="", cwd="", env="", timeout_seconds="")
ExecArguments = Annotated[
    ExecSpec, Without("stream"), Default(timeout_seconds=DEFAULT_SECONDS), WORDS
]
BackgroundArguments = Annotated[BackgroundSpec, WORDS]


async def exec_command(ctx: Ctx, sandbox_id: SandboxId, spec: ExecArguments) -> ExecResult:
    """Run a shell command and wait for it. Long output is cut in the middle: redirect it to a
    file. For what takes over a minute, use exec_background."""
    async with using(ctx, sandbox_id) as use:
        return await run_to_completion(use, spec)


async def run_to_completion(use: Use, spec: ExecSpec) -> ExecResult:
    """Run a command, collect its output and return when it has exited."""
    frames = await call_service(services.exec_stream, use.actor, use.id, spec)
    output = {"stdout": TruncatedOutput(MAX_CHARACTERS), "stderr": TruncatedOutput(MAX_CHARACTERS)}
    last: dict[str, Any] = {}
    # Closing the stream stops the command if the client disconnects.
    async with aclosing(frames):
        async for frame in frames:
            last = frame
            if frame["kind"] == "exec_chunk":
                output[frame["stream"]].feed(base64.b64decode(frame["data"]))
            if sum(stream.size for stream in output.values()) > MAX_OUTPUT:
                # The stream stops the command, records why, and raises this again.
                await frames.athrow(with_output(ExecKilled(TOO_MUCH_OUTPUT), output))
    if last.get("kind") not in {"error", "exec_exited"}:
        raise HostUnavailable("The host closed the command's stream without an exit status.")
    if last["kind"] == "error":
        raise with_output(stream_error(last), output)
    return ExecResult(
        exit_code=last["code"],
        stdout=output["stdout"].text(),
        stderr=output["stderr"].text(),
        duration_ms=last["duration_ms"],
        omitted_bytes=sum(stream.omitted for stream in output.values()),
        sandbox=await use.life(),
        error_code=last.get("error_code"),
        refused_hosts=last.get("refused_hosts"),
    )


def stream_error(frame: dict[str, Any]) -> DomainError:
    """The error in a stream's last frame."""
    if frame["code"] == "exec_timeout":
        return ExecTimeout(f"{frame['message']} Use exec_background for long commands.")
    if frame["code"] == "exec_killed":
        return ExecKilled(frame["message"], signal=frame.get("signal"))
    return Conflict(frame["message"], code=frame["code"])


def with_output(error: DomainError, output: dict[str, TruncatedOutput]) -> DomainError:
    """Attach what the command printed to an error."""
    error.extra |= {name: stream.text() for name, stream in output.items()}
    return error


async def exec_background(
    ctx: Ctx, sandbox_id: SandboxId, spec: BackgroundArguments
) -> BackgroundDetail:
    """Start a shell command that keeps running, and return at once. Then use read_command."""
    async with using(ctx, sandbox_id) as use:
        command = await call_service(services.start_command, use.actor, use.id, spec)
        return await detail(use, command)


async def list_commands(
    ctx: Ctx, sandbox_id: SandboxId, offset: Annotated[int, Field(ge=0)] = 0
) -> Rows:
    """List background commands, running ones first."""
    async with using(ctx, sandbox_id) as use:
        commands = await call_service(services.list_commands, use.actor, use.id)
        ordered = sorted(commands, key=lambda each: not each.running)[offset:]
        rows = fitting(summary(each).model_dump(exclude_none=True) for each in ordered)
        following = offset + len(rows) if len(rows) < len(ordered) else None
        return Rows.model_validate(
            {"commands": rows, "next_offset": following, "sandbox": await use.life()}
        )


async def read_command(
    ctx: Ctx,
    sandbox_id: SandboxId,
    command_id: CommandId,
    offset: Annotated[int, Field(ge=0, description="")] = 0,
    limit: Annotated[int, Field(ge=LEAST_BYTES, le=MAX_CHARACTERS)] = MAX_CHARACTERS,
    wait_seconds: Annotated[
        int, Field(ge=0, le=MAX_WAIT_SECONDS, description="Wait for its end first.")
    ] = 0,
) -> CommandOutput:
    """Read a background command's status and output from a byte offset on."""
    async with using(ctx, sandbox_id) as use:
        if wait_seconds:
            await wait_for_end(use.actor, use.id, command_id, wait_seconds)
        logs = await call_service(services.read_logs, use.actor, use.id, command_id, offset, limit)
        return CommandOutput(
            **(await detail(use, logs.command, changed=bool(wait_seconds))).model_dump(),
            output=logs.content,
            next_offset=logs.next_offset,
            more=logs.truncated,
            dropped_bytes=logs.dropped,
        )


async def wait_for_end(actor: Actor, sandbox_id: str, command_id: str, seconds: int) -> None:
    """Wait until a command has ended or the time is over, without a thread."""
    end = services.LARGEST_OFFSET
    following = await call_service(
        services.begin_following, actor, sandbox_id, command_id, end, seconds
    )
    async with aclosing(services.follow(following)) as frames:
        async for _ in frames:
            pass


async def stop_command(ctx: Ctx, sandbox_id: SandboxId, command_id: CommandId) -> BackgroundDetail:
    """Stop a background command and all it started: SIGTERM, after 2 seconds SIGKILL."""
    async with using(ctx, sandbox_id) as use:
        command = await call_service(services.kill_command, use.actor, use.id, command_id)
        return await detail(use, command)


def summary(command: CommandInfo) -> BackgroundCommand:
    """A command as tools present it."""
    fields = dict[str, Any](presenters.command_detail(command))
    text = fields.pop("command")
    short = text if len(text) <= MAX_COMMAND else f"{text[:MAX_COMMAND]}…"
    known = {name: fields[name] for name in BackgroundCommand.model_fields if name in fields}
    return BackgroundCommand(command_id=command.id, command=short, **known)


async def detail(use: Use, command: CommandInfo, *, changed: bool = False) -> BackgroundDetail:
    """The same, how its sandbox is, and what that was refused while it ran."""
    shown = BackgroundDetail(
        **summary(command).model_dump(), sandbox=await use.life(changed=changed)
    )
    if command.refused:
        refusal = await call_service(services.refusal_of, use.actor, command)
        shown = shown.model_copy(update=dict(refusal.members) if refusal else {})
    return shown


TOOLS = [
    write_tool(exec_command, "exec", destructive=True, open_world=True),
    write_tool(exec_background, destructive=True, open_world=True),
    read_tool(list_commands),
    read_tool(read_command),
    write_tool(stop_command, destructive=True, idempotent=True),
]
