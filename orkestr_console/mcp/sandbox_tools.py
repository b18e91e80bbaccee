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
from orkestr_console.core.ids import new_id
from orkestr_console.http.validation import parse_spec
from orkestr_console.mcp.answers import (
    Background,
    Directory,
    DirectoryEntry,
    ExecResult,
    FilePart,
    LimitsAnswer,
    SandboxAnswer,
    Sandboxes,
    Written,
    sandbox_answer,
)
from orkestr_console.mcp.arguments import Without
from orkestr_console.mcp.output import Kept
from orkestr_console.mcp.template_tools import Cursor, Limit
from orkestr_console.mcp.tool import MOST_CHARACTERS, Ctx, actor_of, ask, reading, writing
from sandboxes_app import presenters, services
from sandboxes_app.specs import ExecSpec, FileSpec, Path, SandboxSpec, TimeoutSpec

USUAL_ENTRIES, MOST_ENTRIES = 200, 1000
# Beyond it a command is ended: nobody reads so much through a tool.
MOST_OUTPUT = 64 * 1024 * 1024
TOO_MUCH = (
    "The command was ended because it printed more than 64 MiB; redirect its output to a file and "
    "read parts of that."
)
OCTAL = re.compile(r"(?:0o?)?[0-7]{1,4}", re.ASCII)

SandboxId = Annotated[str, Field(description="A sandbox's id, such as 'sbx_01J…'.")]
# What the public API's SDK can send, and this server accepts with its default only.
SandboxArguments = Annotated[
    SandboxSpec, Without("on_timeout", "auto_resume", "preview_auth", "region", "volume")
]


async def create_sandbox(ctx: Ctx, spec: SandboxArguments) -> SandboxAnswer:
    """Start a sandbox, an isolated Linux container, from a template or a snapshot.

    Answers when it runs; give exactly one of the two. Write files under /workspace or /tmp.
    Terminate it when you are done.
    """
    return sandbox_answer(await ask(services.create_sandbox, actor_of(ctx), spec))


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
) -> Sandboxes:
    """List the team's sandboxes, newest first, ended ones included."""
    rows, following = await ask(
        services.list_sandboxes,
        actor_of(ctx),
        status=status,
        metadata=metadata,
        limit=limit,
        cursor=cursor,
    )
    return Sandboxes(sandboxes=[sandbox_answer(row) for row in rows], next_cursor=following)


async def get_sandbox(ctx: Ctx, sandbox_id: SandboxId) -> SandboxAnswer:
    """Look at one sandbox: whether it runs, and until when."""
    return sandbox_answer(await ask(services.get_sandbox, actor_of(ctx), sandbox_id))


async def exec_command(
    ctx: Ctx, sandbox_id: SandboxId, spec: Annotated[ExecSpec, Without("stream")]
) -> ExecResult:
    """Run a shell command in a sandbox to its end; a non-zero exit code is an answer, not an error.

    Of long output the beginning and the end are kept; for all of it, redirect it to a file and use
    read_file. For what runs on, use exec_background.
    """
    return await run_to_the_end(ctx, sandbox_id, spec)


async def run_to_the_end(ctx: Ctx, sandbox_id: str, spec: ExecSpec) -> ExecResult:
    """What came of a command."""
    frames = await ask(services.exec_stream, actor_of(ctx), sandbox_id, spec)
    kept = {"stdout": Kept(MOST_CHARACTERS), "stderr": Kept(MOST_CHARACTERS)}
    last: dict[str, Any] = {}
    # Closing the stream ends the command, should the client go away.
    async with aclosing(frames):
        async for frame in frames:
            last = frame
            if frame["kind"] == "exec_chunk":
                kept[frame["stream"]].feed(base64.b64decode(frame["data"]))
            if sum(one.size for one in kept.values()) > MOST_OUTPUT:
                # Raised by the stream again, once that has ended the command and noted why.
                await frames.athrow(with_output(ExecKilled(TOO_MUCH), kept))
    if last.get("kind") not in {"error", "exec_exited"}:
        raise HostUnavailable("The host ended the command's stream without saying how it ended.")
    if last["kind"] == "error":
        raise with_output(failure(last), kept)
    return ExecResult(
        exit_code=last["code"],
        stdout=kept["stdout"].text(),
        stderr=kept["stderr"].text(),
        duration_ms=last["duration_ms"],
        omitted_bytes=sum(one.omitted for one in kept.values()),
    )


def failure(frame: dict[str, Any]) -> DomainError:
    """The error that a stream ended with."""
    if frame["code"] == "exec_timeout":
        return ExecTimeout(f"{frame['message']} Use exec_background for long commands.")
    if frame["code"] == "exec_killed":
        return ExecKilled(frame["message"], signal=frame.get("signal"))
    return Conflict(frame["message"], code=frame["code"])


def with_output(error: DomainError, kept: dict[str, Kept]) -> DomainError:
    """The error with what the command had printed."""
    error.extra |= {stream: one.text() for stream, one in kept.items()}
    return error


async def exec_background(
    ctx: Ctx,
    sandbox_id: SandboxId,
    spec: Annotated[ExecSpec, Without("stream", "timeout_seconds")],
) -> Background:
    """Start a shell command that runs on after this call, such as a server or a long test run.

    Its output goes to a file in the sandbox, which takes of the sandbox's memory.
    """
    place = f"/tmp/background/{new_id('cmd')[-10:].lower()}"
    recorded = spec.model_copy(update={"command": in_background(spec.command, place)})
    done = await run_to_the_end(ctx, sandbox_id, recorded)
    if done.exit_code != 0 or not done.stdout.strip().isdecimal():
        said = done.stderr.strip() or "the shell printed nothing"
        raise Conflict(f"The command could not be started: {said}.", code="not_started")
    return Background(pid=int(done.stdout), log_path=f"{place}/log", exit_code_path=f"{place}/exit")


def in_background(command: str, place: str) -> str:
    """A script that runs a command in a session of its own, and then writes its exit code.

    The command goes there in a file: quoted inside of quotes it would soon be too long.
    """
    end = f"END-{place.rpartition('/')[2]}"
    return (
        f"mkdir -p {place} && cat >{place}/command <<'{end}' || exit\n{command}\n{end}\n"
        f"setsid sh -c '$(command -v bash || echo sh) {place}/command; echo $? >{place}/exit' "
        f">{place}/log 2>&1 </dev/null & echo $!"
    )


async def read_file(
    ctx: Ctx,
    sandbox_id: SandboxId,
    path: Path,
    offset: Annotated[int, Field(ge=0, description="Offset to start from, in bytes.")] = 0,
    limit: Annotated[
        int, Field(ge=1, le=MOST_CHARACTERS, description="Maximum number of bytes.")
    ] = MOST_CHARACTERS,
) -> FilePart:
    """Read a file of a sandbox, or a part of it; bytes that are no text come as base64.

    Of a file above 16 MiB, read parts with exec: tail -c +OFFSET FILE | head -c 30000.
    """
    try:
        found = await ask(services.read_path, actor_of(ctx), sandbox_id, path)
    except PayloadTooLarge:
        raise Conflict(too_large(path), code=PayloadTooLarge.default_code) from None
    if not isinstance(found, FileContent):
        raise Conflict(f"{path} is a directory; use list_files.", code="is_a_directory")
    return file_part(path, found.content, offset, limit)


def too_large(path: str) -> str:
    """What to do with a file that is too large to be read whole."""
    return (
        f"{path} is larger than the 16 MiB that read_file takes. Read a part of it with exec: "
        f"tail -c +1 {shlex.quote(path)} | head -c {MOST_CHARACTERS}."
    )


def file_part(path: str, content: bytes, offset: int, limit: int) -> FilePart:
    """A part of a file, as text where it is that; a character is never cut in two."""
    part = content[offset : offset + limit]
    rest = len(content) > offset + len(part)
    try:
        text, encoding = part.decode(), "utf-8"
    except UnicodeDecodeError as error:
        if rest and error.end == len(part) and 0 < error.start >= len(part) - 3:
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
        str, Field(description="Permissions in octal, as chmod has them: '644', '755' or '0755'.")
    ] = "644",
) -> Written:
    """Write a file under /workspace or /tmp, whole, making its directories; at most 16 MiB."""
    encoded = content if encoding == "base64" else in_base64(content)
    spec = parse_spec(FileSpec, {"path": path, "content": encoded, "mode": permissions(mode)})
    size = await ask(services.write_file, actor_of(ctx), sandbox_id, spec)
    return Written(path=path, bytes_written=size)


def permissions(mode: str) -> int:
    """The number that octal digits stand for. Raises ``InvalidInput`` for what is none."""
    if not OCTAL.fullmatch(mode):
        problem = "must be permissions in octal, such as '644' or '755'."
        raise InvalidInput(f"mode: {problem}", fields={"mode": problem})
    return int(mode.removeprefix("0o"), 8)


def in_base64(text: str) -> str:
    """A file's text as its bytes in base64. Raises ``InvalidInput`` for what is no Unicode text."""
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
        int, Field(ge=1, le=MOST_ENTRIES, description="Maximum number of entries.")
    ] = USUAL_ENTRIES,
) -> Directory:
    """List what is in a directory of a sandbox, with sizes and times, by name."""
    try:
        found = await ask(services.read_path, actor_of(ctx), sandbox_id, path)
    except PayloadTooLarge:
        raise Conflict(
            f"{path} has more entries than list_files takes; use ls and head with exec.",
            code=PayloadTooLarge.default_code,
        ) from None
    if not isinstance(found, DirectoryListing):
        raise Conflict(f"{path} is a file; use read_file.", code="is_a_file")
    entries = presenters.path_content(found)["entries"]
    end = offset + limit
    return Directory(
        path=path,
        entries=[DirectoryEntry.model_validate(entry) for entry in entries[offset:end]],
        total=len(entries),
        next_offset=end if end < len(entries) else None,
    )


async def set_sandbox_timeout(ctx: Ctx, sandbox_id: SandboxId, spec: TimeoutSpec) -> SandboxAnswer:
    """Let a running sandbox live longer, or shorter, from now on."""
    await ask(services.set_timeout, actor_of(ctx), sandbox_id, spec)
    return sandbox_answer(await ask(services.get_sandbox, actor_of(ctx), sandbox_id))


async def pause_sandbox(ctx: Ctx, sandbox_id: SandboxId) -> SandboxAnswer:
    """Let a running sandbox stand still: its processes, memory and files stay as they are.

    It takes no place among the running ones, and ends if nobody resumes it within a week. It does
    not outlive a restart of the machine. Go on with resume_sandbox.
    """
    return sandbox_answer(await ask(services.pause_sandbox, actor_of(ctx), sandbox_id))


async def resume_sandbox(ctx: Ctx, sandbox_id: SandboxId) -> SandboxAnswer:
    """Let a paused sandbox run on where it stood, for as long again as it was created for."""
    return sandbox_answer(await ask(services.resume_sandbox, actor_of(ctx), sandbox_id))


async def terminate_sandbox(ctx: Ctx, sandbox_id: SandboxId) -> SandboxAnswer:
    """End a sandbox for good; its files are gone. One that has ended stays as it is."""
    await ask(services.terminate_sandbox, actor_of(ctx), sandbox_id)
    return sandbox_answer(await ask(services.get_sandbox, actor_of(ctx), sandbox_id))


async def get_sandbox_limits(ctx: Ctx) -> LimitsAnswer:
    """What your team's plan allows: sizes, networks, how many at once, how long, which hosts."""
    found = await ask(services.limits, actor_of(ctx))
    return LimitsAnswer.model_validate(presenters.limits_detail(found))


TOOLS = [
    writing(create_sandbox, open_world=True),
    reading(list_sandboxes),
    reading(get_sandbox),
    writing(exec_command, "exec", destructive=True, open_world=True),
    writing(exec_background, destructive=True, open_world=True),
    reading(read_file),
    writing(write_file, destructive=True, idempotent=True),
    reading(list_files),
    writing(set_sandbox_timeout, idempotent=True),
    writing(pause_sandbox),
    writing(resume_sandbox),
    writing(terminate_sandbox, destructive=True, idempotent=True),
    reading(get_sandbox_limits),
]
