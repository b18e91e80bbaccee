"""The tools for files."""

from __future__ import annotations

import base64
import re
import shlex
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from django.conf import settings
from mcp_types import CallToolResult, ImageContent
from pydantic import BaseModel, ConfigDict, Field

from hostruntime.wire.files import DirectoryListing, WantedPart
from orkestr_console.core.errors import (
    Conflict,
    DomainError,
    InvalidInput,
    PayloadTooLarge,
    RangeNotSatisfiable,
)
from orkestr_console.http.json_api import MAX_DEPTH, reject_unusable
from orkestr_console.http.validation import parse_spec
from orkestr_console.mcp.arguments import Brief
from orkestr_console.mcp.lists import fitting
from orkestr_console.mcp.results import (
    Directory,
    EditedFile,
    FilePart,
    Picture,
    TransferAddress,
    WrittenFile,
    WrittenFiles,
)
from orkestr_console.mcp.tool import (
    MAX_CHARACTERS,
    Ctx,
    awake,
    call_service,
    read_tool,
    request_of,
    result,
    write_tool,
)
from orkestr_console.mcp.using import SandboxId, Use, using
from sandboxes_app import presenters, services
from sandboxes_app.services import FileRange
from sandboxes_app.specs import MAX_FILES, BatchSpec, EditSpec, FileSpec, Path, PresignSpec

MAX_ENTRIES = 1000
# What is shown of a file that is no text, unless more is asked for: it would cost many tokens.
BINARY_BYTES = 600
# What models take, as base64.
MAX_IMAGE_BYTES = 3_700_000
IMAGES = {
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF87a": "image/gif",
    b"GIF89a": "image/gif",
}
CONTINUATION_BYTES, MAX_CHARACTER_BYTES = bytes(range(0x80, 0xC0)), 4
OCTAL = re.compile(r"(?:0o?)?[0-7]{1,4}", re.ASCII)

PathName = Annotated[Path, Field(description="")]
Encoding = Literal["utf-8", "base64"]
Mode = Annotated[str, Field(description="Octal.")]


async def read_file(
    ctx: Ctx,
    sandbox_id: SandboxId,
    path: PathName,
    offset: Annotated[int | None, Field(description="First byte; negative: from the end.")] = None,
    limit: Annotated[int | None, Field(ge=1, le=MAX_CHARACTERS, description="Bytes.")] = None,
    line: Annotated[int | None, Field(description="First line instead; -10: the last 10.")] = None,
    lines: Annotated[int | None, Field(ge=1, description="")] = None,
) -> CallToolResult:
    """Read a file or a part of it. Images come as images, other binary files as base64."""
    async with using(ctx, sandbox_id) as use:
        wanted = wanted_part(offset, limit or MAX_CHARACTERS, line, lines)
        found = await read_range(use, path, wanted)
        if (offset, limit, line, lines) == (None,) * 4 and (kind := image_type(found.content)):
            return await picture(use, found, kind)
        return result(file_part(found, limit, await use.life()))


def wanted_part(offset: int | None, limit: int, line: int | None, lines: int | None) -> WantedPart:
    """What a call asks for. Raises ``InvalidInput`` for bytes and lines at once."""
    if line is None and lines is None:
        offset = offset or 0
        if offset < 0:
            return WantedPart(last=-offset, most=limit)
        return WantedPart(first=offset, last=offset + limit - 1, most=limit)
    if offset is not None:
        problem = "can't be used together with line or lines."
        raise InvalidInput(f"offset: {problem}", fields={"offset": problem})
    if line == 0:
        problem = "must be 1 or more, or negative to count from the end."
        raise InvalidInput(f"line: {problem}", fields={"line": problem})
    return WantedPart(line=line or 1, lines=lines, most=limit)


async def read_range(use: Use, path: str, wanted: WantedPart) -> FileRange:
    """A part of a file; a blank one at the very end. Raises the errors of files."""
    try:
        return await awake(lambda: services.read_range(use.actor, use.id, path, wanted))
    except RangeNotSatisfiable as error:
        size = error.size
        if wanted.line is None and (wanted.first is None or wanted.first == size):
            return FileRange(path, size, size, b"")
        if wanted.line is None:
            raise InvalidInput(
                f"offset: {path} has only {size:,} bytes.", fields={"offset": "is past the end."}
            ) from None
        raise InvalidInput(f"line: {error.detail}", fields={"line": error.detail}) from None
    except DomainError as error:
        if "is a directory" in error.detail:
            raise Conflict(
                f"{path} is a directory; use list_files.", code="is_a_directory"
            ) from None
        raise


def image_type(content: bytes) -> str | None:
    """The media type of a picture that models can see, by its first bytes."""
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "image/webp"
    return next((kind for magic, kind in IMAGES.items() if content.startswith(magic)), None)


async def picture(use: Use, head: FileRange, kind: str) -> CallToolResult:
    """A file as a picture. Raises ``PayloadTooLarge`` for one that no model takes."""
    if head.size > MAX_IMAGE_BYTES:
        raise PayloadTooLarge(
            MAX_IMAGE_BYTES,
            f"{head.path} is an image of {head.size:,} bytes; only {MAX_IMAGE_BYTES:,} can be "
            "shown. Make it smaller with exec, pass limit for its bytes, or use get_file_url.",
        )
    content = head.content
    if len(content) < head.size:
        rest = WantedPart(first=len(content), most=MAX_IMAGE_BYTES)
        content += (await read_range(use, head.path, rest)).content
    data = base64.b64encode(content).decode()
    said = Picture(path=head.path, size=len(content), mime_type=kind, sandbox=await use.life())
    return result(said, ImageContent(type="image", data=data, mime_type=kind))


def file_part(found: FileRange, limit: int | None, life: str) -> FilePart:
    """Part of a file, as text if it is valid UTF-8. No character is split."""
    part, offset = found.content, found.offset
    hint = None
    if offset and (begun := len(part) - len(part.lstrip(CONTINUATION_BYTES))) < MAX_CHARACTER_BYTES:
        # It begins within a character, unless nothing in it is one.
        text = decoded(part[begun:], more=offset + len(part) < found.size)
        if text is not None:
            part, offset = part[begun:], offset + begun
    if (text := decoded(part, more=offset + len(part) < found.size)) is not None:
        encoding: Encoding = "utf-8"
        part = text.encode()
    else:
        if limit is None and len(part) > BINARY_BYTES:
            part = part[:BINARY_BYTES]
            hint = "Not text. Pass limit for more bytes, or use get_file_url for the file."
        text, encoding = base64.b64encode(part).decode(), "base64"
    end = offset + len(part)
    return FilePart(
        path=found.path,
        size=found.size,
        offset=offset,
        content=text,
        encoding=encoding,
        next_offset=end if end < found.size else None,
        hint=hint,
        sandbox=life,
    )


def decoded(part: bytes, *, more: bool) -> str | None:
    """Text, without a character that is cut at its end if there is more; None if it is no text."""
    if b"\0" in part:
        return None
    try:
        return part.decode()
    except UnicodeDecodeError as error:
        if more and error.end == len(part) and 0 < error.start >= len(part) - 3:
            return part[: error.start].decode()
        return None


async def write_file(
    ctx: Ctx,
    sandbox_id: SandboxId,
    path: PathName,
    content: Annotated[str, Field(description="")],
    encoding: Annotated[Encoding, Field(description="")] = "utf-8",
    mode: Mode = "644",
) -> WrittenFile:
    """Write a whole file, up to 16 MiB."""
    spec = parse_spec(FileSpec, file_row(path, content, encoding, mode))
    async with using(ctx, sandbox_id) as use:
        size = await call_service(services.write_file, use.actor, use.id, spec)
        return WrittenFile(path=path, bytes_written=size, sandbox=await use.life())


class NewFile(BaseModel):
    """One of the files of ``write_files``."""

    model_config = ConfigDict(extra="forbid")

    path: str
    content: str
    encoding: Encoding = "utf-8"
    mode: str = "644"


async def write_files(
    ctx: Ctx,
    sandbox_id: SandboxId,
    files: Annotated[list[NewFile], Field(min_length=1, max_length=MAX_FILES, description="")],
) -> WrittenFiles:
    """Write several files, as write_file does; each succeeds or fails by itself."""
    rows = [file_row(one.path, one.content, one.encoding, one.mode) for one in files]
    spec = parse_spec(BatchSpec, {"files": rows})
    async with using(ctx, sandbox_id) as use:
        written = await call_service(services.write_batch, use.actor, use.id, spec)
        failed = sum(row.error is not None for row in written)
        return WrittenFiles(
            written=len(written) - failed,
            failed=failed,
            results=[batch_row(row) for row in written],
            sandbox=await use.life(),
        )


def batch_row(row: services.BatchRow) -> dict[str, Any]:
    """The result of one file."""
    if row.error is None:
        return {"path": row.path, "bytes_written": row.bytes_written}
    return {"path": row.path, "error": f"{row.error}: {row.detail}"}


def file_row(path: str, content: str, encoding: str, mode: str) -> dict[str, Any]:
    """A file as REST has it. Raises ``InvalidInput``."""
    reject_unusable(path, "path", MAX_DEPTH)
    encoded = content if encoding == "base64" else encode_base64(content)
    return {"path": path, "content": encoded, "mode": permissions(mode)}


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


async def edit_file(
    ctx: Ctx,
    sandbox_id: SandboxId,
    spec: Annotated[EditSpec, Brief(path="", old="Exact text.", new="", replace_all="")],
) -> EditedFile:
    """Replace text in a file, all or nothing."""
    async with using(ctx, sandbox_id) as use:
        done = await call_service(services.edit_file, use.actor, use.id, spec)
        return EditedFile(
            path=spec.path,
            replaced=done.count,
            first_line=done.line,
            size=done.size,
            sandbox=await use.life(),
        )


async def list_files(
    ctx: Ctx,
    sandbox_id: SandboxId,
    path: PathName = "/workspace",
    offset: Annotated[int, Field(ge=0, description="")] = 0,
    limit: Annotated[int, Field(ge=1, le=MAX_ENTRIES, description="")] = MAX_ENTRIES,
) -> Directory:
    """List a directory by name."""
    async with using(ctx, sandbox_id) as use:
        try:
            listing = await call_service(services.read_path, use.actor, use.id, path)
        except PayloadTooLarge:
            # Of a file, the size; of a directory, the number of entries.
            raise Conflict(
                f"{path} has more entries than list_files can return, or is a large file; use ls "
                "and head with exec.",
                code=PayloadTooLarge.default_code,
            ) from None
        if not isinstance(listing, DirectoryListing):
            raise Conflict(f"{path} is a file; use read_file.", code="is_a_file")
        return directory(path, listing, offset, limit, await use.life())


def directory(
    path: str, listing: DirectoryListing, offset: int, limit: int, life: str
) -> Directory:
    """The entries from ``offset`` on that fit."""
    entries = presenters.path_content(listing)["entries"]
    rows = fitting(entry_row(entry) for entry in entries[offset : offset + limit])
    end = offset + len(rows)
    return Directory(
        path=path,
        entries=rows,
        total=len(entries),
        next_offset=end if end < len(entries) else None,
        sandbox=life,
    )


def entry_row(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of a directory, briefly; a directory's own size says nothing."""
    kind = {"is_dir": True} if entry["is_dir"] else {"size": entry["size"]}
    modified = str(entry["modified_at"] or "")[:19]
    return {"name": entry["name"], **kind, "mode": f"{entry['mode']:o}", "modified_at": modified}


async def get_file_url(
    ctx: Ctx,
    sandbox_id: SandboxId,
    path: PathName,
    upload: Annotated[bool, Field(description="")] = False,
    expires_in: Annotated[int, Field(ge=60, le=3600, description="Seconds.")] = 600,
) -> TransferAddress:
    """Get a URL to download a file of any size, or to upload one once, without a token."""
    spec = parse_spec(PresignSpec, {"path": path, "expires_in": expires_in})
    presign = services.presign_upload if upload else services.presign_download
    async with using(ctx, sandbox_id) as use:
        made = await call_service(presign, use.actor, use.id, spec)
        example = "curl -T FILE {url}" if upload else "curl -o FILE {url}"
        return transfer_address(ctx, made, example, await use.life())


def transfer_address(ctx: Ctx, made: services.Address, example: str, life: str) -> TransferAddress:
    """An address at the origin that the caller used."""
    address = request_of(ctx).url
    # As console_address() does; the endpoint has checked the host.
    own = str(settings.PUBLIC_URL) if settings.PUBLIC_URL_IS_SET else ""
    fields = presenters.presigned(made, own or f"{address.scheme}://{address.netloc}")
    command = example.format(url=shlex.quote(fields["url"]))
    return TransferAddress(**fields, example=command, sandbox=life)


TOOLS = [
    read_tool(read_file),
    write_tool(write_file, destructive=True, idempotent=True),
    write_tool(write_files, destructive=True, idempotent=True),
    write_tool(edit_file, destructive=True),
    read_tool(list_files),
    # To make an address changes nothing, and takes the right to what it is for.
    read_tool(get_file_url),
]
