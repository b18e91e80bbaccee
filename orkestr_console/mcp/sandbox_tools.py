"""The tools for sandboxes."""

from __future__ import annotations

import base64
import re
import shlex
from contextlib import aclosing
from typing import Annotated, Any, Literal

from pydantic import Field

from hostruntime.wire.files import DirectoryListing, FileContent
from orkestr_console.core.errors import (
    Conflict,
    DomainError,
    ExecKilled,
    ExecTimeout,
    HostUnavailable,
    InvalidInput,
    PayloadTooLarge,
)
from orkestr_console.http.validation import parse_spec
from orkestr_console.mcp.arguments import Without
from orkestr_console.mcp.output import TruncatedOutput
from orkestr_console.mcp.results import (
    Directory,
    DirectoryEntry,
    ExecResult,
    FilePart,
    LimitsDetail,
    SandboxDetail,
    SandboxPage,
    WrittenFile,
    sandbox_detail,
)
from orkestr_console.mcp.template_tools import Cursor, Limit
from orkestr_console.mcp.tool import (
    MAX_CHARACTERS,
    Ctx,
    actor_of,
    call_service,
    read_tool,
    write_tool,
)
from sandboxes_app import presenters, services
from sandboxes_app.specs import ExecSpec, FileSpec, Path, SandboxSpec, TimeoutSpec

DEFAULT_ENTRIES, MAX_ENTRIES = 200, 1000
# In bytes. A command that prints more is stopped: nobody reads that much through a tool.
MAX_OUTPUT = 64 * 1024 * 1024
TOO_MUCH_OUTPUT = (
    "The command was stopped because it printed more than 64 MiB. Redirect its output to a file "
    "and read that in parts."
)
OCTAL = re.compile(r"(?:0o?)?[0-7]{1,4}", re.ASCII)

SandboxId = Annotated[str, Field(description="A sandbox's id, such as 'sbx_01J…'.")]
# What the public API's SDK can send, and this server accepts with its default only.
SandboxArguments = Annotated[SandboxSpec, Without("preview_auth", "region")]


async def create_sandbox(ctx: Ctx, spec: SandboxArguments) -> SandboxDetail:
    """Start a sandbox, an isolated Linux container, from a template or a snapshot.

    Returns once it is running. Provide exactly one of template and snapshot. Write files under
    /workspace or /tmp, and what is to outlive it under /persist, with a volume. Terminate it when
    you are done.
    """
    return sandbox_detail(await call_service(services.create_sandbox, actor_of(ctx), spec))


async def list_sandboxes(
    ctx: Ctx,
    status: Annotated[
        str | None, Field(description="Only those with this status, such as 'running'.")
    ] = None,
    metadata: Annotated[
        dict[str, str] | None, Field(description="Only those with all of these labels.")
    ] = None,
    limit: Limit = None,
    cursor: Cursor = None,
) -> SandboxPage:
    """List the team's sandboxes, newest first, including terminated ones."""
    rows, next_cursor = await call_service(
        services.list_sandboxes,
        actor_of(ctx),
        status=status,
        metadata=metadata,
        limit=limit,
        cursor=cursor,
    )
    return SandboxPage(sandboxes=[sandbox_detail(row) for row in rows], next_cursor=next_cursor)


async def get_sandbox(ctx: Ctx, sandbox_id: SandboxId) -> SandboxDetail:
    """Get one sandbox: its status and when it expires."""
    return sandbox_detail(await call_service(services.get_sandbox, actor_of(ctx), sandbox_id))


async def exec_command(
    ctx: Ctx, sandbox_id: SandboxId, spec: Annotated[ExecSpec, Without("stream")]
) -> ExecResult:
    """Run a shell command in a sandbox and wait for it. A non-zero exit code is not an error.

    Long output is cut in the middle; to see it all, redirect it to a file and use read_file. For
    servers and long commands, use exec_background.
    """
    return await run_to_completion(ctx, sandbox_id, spec)


async def run_to_completion(ctx: Ctx, sandbox_id: str, spec: ExecSpec) -> ExecResult:
    """Run a command, collect its output and return when it has exited."""
    frames = await call_service(services.exec_stream, actor_of(ctx), sandbox_id, spec)
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
        error_code=last.get("error_code", ""),
        refused_hosts=last.get("refused_hosts", []),
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


async def read_file(
    ctx: Ctx,
    sandbox_id: SandboxId,
    path: Path,
    offset: Annotated[int, Field(ge=0, description="Offset to start from, in bytes.")] = 0,
    limit: Annotated[
        int, Field(ge=1, le=MAX_CHARACTERS, description="Maximum number of bytes.")
    ] = MAX_CHARACTERS,
) -> FilePart:
    """Read a file of a sandbox, or part of one. Content that isn't valid UTF-8 comes as base64.

    Read files above 16 MiB in parts with exec: tail -c +OFFSET FILE | head -c 30000.
    """
    try:
        file = await call_service(services.read_path, actor_of(ctx), sandbox_id, path)
    except PayloadTooLarge:
        raise Conflict(too_large_advice(path), code=PayloadTooLarge.default_code) from None
    if not isinstance(file, FileContent):
        raise Conflict(f"{path} is a directory; use list_files.", code="is_a_directory")
    return file_part(path, file.content, offset, limit)


def too_large_advice(path: str) -> str:
    """How to read a file that is too large for read_file."""
    return (
        f"{path} is larger than read_file's limit of 16 MiB. Read a part of it with exec: "
        f"tail -c +1 {shlex.quote(path)} | head -c {MAX_CHARACTERS}."
    )


def file_part(path: str, content: bytes, offset: int, limit: int) -> FilePart:
    """Part of a file, as text if it is valid UTF-8. No character is split."""
    part = content[offset : offset + limit]
    more = len(content) > offset + len(part)
    try:
        text, encoding = part.decode(), "utf-8"
    except UnicodeDecodeError as error:
        if more and error.end == len(part) and 0 < error.start >= len(part) - 3:
            part = part[: error.start]
            text, encoding = part.decode(), "utf-8"
        else:
            text, encoding = base64.b64encode(part).decode(), "base64"
    end = offset + len(part)
    return FilePart(
        path=path,
        size=len(content),
        offset=offset,
        content=text,
        encoding=encoding,
        next_offset=end if end < len(content) else None,
    )


async def write_file(
    ctx: Ctx,
    sandbox_id: SandboxId,
    path: Path,
    content: Annotated[str, Field(description="Text, or base64 with encoding 'base64'.")],
    encoding: Annotated[
        Literal["utf-8", "base64"], Field(description="How content is encoded.")
    ] = "utf-8",
    mode: Annotated[
        str, Field(description="Permissions in octal, as for chmod: '644', '755' or '0755'.")
    ] = "644",
) -> WrittenFile:
    """Write a whole file of at most 16 MiB, creating its directories.

    It must be under /workspace or /tmp, or, with a volume, /persist.
    """
    encoded = content if encoding == "base64" else encode_base64(content)
    spec = parse_spec(FileSpec, {"path": path, "content": encoded, "mode": permissions(mode)})
    size = await call_service(services.write_file, actor_of(ctx), sandbox_id, spec)
    return WrittenFile(path=path, bytes_written=size)


def permissions(mode: str) -> int:
    """Parse an octal mode. Raises ``InvalidInput``."""
    if not OCTAL.fullmatch(mode):
        problem = "must be permissions in octal, such as '644' or '755'."
        raise InvalidInput(f"mode: {problem}", fields={"mode": problem})
    return int(mode.removeprefix("0o"), 8)


def encode_base64(text: str) -> str:
    """Encode text as UTF-8 in base64. Raises ``InvalidInput`` for half of a surrogate pair."""
    try:
        return base64.b64encode(text.encode()).decode()
    except UnicodeEncodeError:
        problem = "has half of a surrogate pair; send the bytes in base64, with encoding 'base64'."
        raise InvalidInput(f"content: {problem}", fields={"content": problem}) from None


async def list_files(
    ctx: Ctx,
    sandbox_id: SandboxId,
    path: Path = "/workspace",
    offset: Annotated[int, Field(ge=0, description="Number of entries to skip.")] = 0,
    limit: Annotated[
        int, Field(ge=1, le=MAX_ENTRIES, description="Maximum number of entries.")
    ] = DEFAULT_ENTRIES,
) -> Directory:
    """List the entries of a directory of a sandbox by name, with sizes and times."""
    try:
        listing = await call_service(services.read_path, actor_of(ctx), sandbox_id, path)
    except PayloadTooLarge:
        raise Conflict(
            f"{path} has more entries than list_files can return; use ls and head with exec.",
            code=PayloadTooLarge.default_code,
        ) from None
    if not isinstance(listing, DirectoryListing):
        raise Conflict(f"{path} is a file; use read_file.", code="is_a_file")
    entries = presenters.path_content(listing)["entries"]
    end = offset + limit
    return Directory(
        path=path,
        entries=[DirectoryEntry.model_validate(entry) for entry in entries[offset:end]],
        total=len(entries),
        next_offset=end if end < len(entries) else None,
    )


async def set_sandbox_timeout(ctx: Ctx, sandbox_id: SandboxId, spec: TimeoutSpec) -> SandboxDetail:
    """Change when a running sandbox expires, counted from now."""
    await call_service(services.set_timeout, actor_of(ctx), sandbox_id, spec)
    return sandbox_detail(await call_service(services.get_sandbox, actor_of(ctx), sandbox_id))


async def pause_sandbox(ctx: Ctx, sandbox_id: SandboxId) -> SandboxDetail:
    """Pause a running sandbox: its processes, memory and files stay as they are.

    A paused sandbox doesn't count as running. It is terminated if nobody resumes it within a week,
    and it doesn't survive a restart of the server. Continue it with resume_sandbox.
    """
    return sandbox_detail(await call_service(services.pause_sandbox, actor_of(ctx), sandbox_id))


async def resume_sandbox(ctx: Ctx, sandbox_id: SandboxId) -> SandboxDetail:
    """Resume a paused sandbox where it stopped; its full timeout starts again."""
    return sandbox_detail(await call_service(services.resume_sandbox, actor_of(ctx), sandbox_id))


async def terminate_sandbox(ctx: Ctx, sandbox_id: SandboxId) -> SandboxDetail:
    """Terminate a sandbox and delete its files. If it has already ended, nothing changes."""
    await call_service(services.terminate_sandbox, actor_of(ctx), sandbox_id)
    return sandbox_detail(await call_service(services.get_sandbox, actor_of(ctx), sandbox_id))


async def get_sandbox_limits(ctx: Ctx) -> LimitsDetail:
    """Get your team's limits: sizes, networks, concurrency, timeouts and allowed hosts."""
    limits = await call_service(services.limits, actor_of(ctx))
    return LimitsDetail.model_validate(presenters.limits_detail(limits))


TOOLS = [
    write_tool(create_sandbox, open_world=True),
    read_tool(list_sandboxes),
    read_tool(get_sandbox),
    write_tool(exec_command, "exec", destructive=True, open_world=True),
    read_tool(read_file),
    write_tool(write_file, destructive=True, idempotent=True),
    read_tool(list_files),
    write_tool(set_sandbox_timeout, idempotent=True),
    write_tool(pause_sandbox),
    write_tool(resume_sandbox),
    write_tool(terminate_sandbox, destructive=True, idempotent=True),
    read_tool(get_sandbox_limits),
]
