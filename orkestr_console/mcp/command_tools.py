"""The tools for commands that run in the background of a sandbox."""

from __future__ import annotations

from contextlib import aclosing
from typing import Annotated, Any

from pydantic import Field

from hostruntime.wire.background import CommandInfo
from orkestr_console.accounts.actor import Actor
from orkestr_console.mcp.results import (
    MAX_COMMAND,
    BackgroundCommand,
    BackgroundCommands,
    CommandOutput,
)
from orkestr_console.mcp.sandbox_tools import SandboxId
from orkestr_console.mcp.tool import (
    MAX_CHARACTERS,
    Ctx,
    actor_of,
    call_service,
    read_tool,
    write_tool,
)
from sandboxes_app import presenters, services
from sandboxes_app.specs import BackgroundSpec

# Many clients give up after a minute.
MAX_WAIT_SECONDS = 50
# A character's (RFC 3629), or there would be no progress.
LEAST_BYTES = 4

CommandId = Annotated[str, Field(description="A background command's id, such as 'cmd_01J…'.")]


async def exec_background(
    ctx: Ctx, sandbox_id: SandboxId, spec: BackgroundSpec
) -> BackgroundCommand:
    """Start a shell command that keeps running after this call, such as a server or a test suite.

    It runs until it ends, stop_command ends it, or the sandbox ends. Then use read_command.
    """
    return detail(await call_service(services.start_command, actor_of(ctx), sandbox_id, spec))


async def list_commands(ctx: Ctx, sandbox_id: SandboxId) -> BackgroundCommands:
    """List a sandbox's background commands, newest first, with how they ended."""
    commands = await call_service(services.list_commands, actor_of(ctx), sandbox_id)
    return BackgroundCommands(commands=[detail(each) for each in commands])


async def read_command(
    ctx: Ctx,
    sandbox_id: SandboxId,
    command_id: CommandId,
    offset: Annotated[int, Field(ge=0, description="Offset to start from, in bytes.")] = 0,
    limit: Annotated[
        int, Field(ge=LEAST_BYTES, le=MAX_CHARACTERS, description="Maximum number of bytes.")
    ] = MAX_CHARACTERS,
    wait_seconds: Annotated[
        int,
        Field(ge=0, le=MAX_WAIT_SECONDS, description="Seconds to wait first until it has ended."),
    ] = 0,
) -> CommandOutput:
    """Read a background command's status and output, after waiting for its end if you want to.

    Continue at next_offset. About the last 4 MiB of output are kept.
    """
    actor = actor_of(ctx)
    if wait_seconds:
        await wait_for_end(actor, sandbox_id, command_id, wait_seconds)
    logs = await call_service(services.read_logs, actor, sandbox_id, command_id, offset, limit)
    return CommandOutput(
        **detail(logs.command).model_dump(),
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


async def stop_command(ctx: Ctx, sandbox_id: SandboxId, command_id: CommandId) -> BackgroundCommand:
    """Stop a background command and all processes it started: SIGTERM, after 2 seconds SIGKILL.

    If it has already ended, nothing changes.
    """
    return detail(await call_service(services.kill_command, actor_of(ctx), sandbox_id, command_id))


def detail(command: CommandInfo) -> BackgroundCommand:
    """A command as tools present it."""
    fields = dict[str, Any](presenters.command_detail(command))
    text = fields.pop("command")
    short = text if len(text) <= MAX_COMMAND else f"{text[:MAX_COMMAND]}…"
    known = {name: fields[name] for name in BackgroundCommand.model_fields if name in fields}
    return BackgroundCommand(command_id=command.id, command=short, **known)


TOOLS = [
    write_tool(exec_background, destructive=True, open_world=True),
    read_tool(list_commands),
    read_tool(read_command),
    write_tool(stop_command, destructive=True, idempotent=True),
]
