"""Files in a sandbox."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from hostruntime.agent.requests import (
    path_parameter,
    query_number,
    query_parameter,
    read_message,
)
from hostruntime.agent.responses import no_content, respond
from hostruntime.container.files import FileService
from hostruntime.errors import InvalidRequest
from hostruntime.sandbox.manager import SandboxManager
from hostruntime.wire.files import (
    DirectoryEntries,
    EditFile,
    FileStat,
    MakeDirectory,
    MoveFile,
    WrittenFile,
)

_FILES = "/sandboxes/{id}/files"


def routes(sandboxes: SandboxManager, files: FileService) -> list[Route]:
    """The routes, over a host's sandboxes."""

    async def delete(request: Request) -> Response:
        name = sandboxes.container_name(path_parameter(request))
        await files.delete(name, query_parameter(request, "path"))
        return no_content()

    async def mkdir(request: Request) -> Response:
        message = await read_message(request, MakeDirectory)
        name = sandboxes.container_name(path_parameter(request))
        await files.mkdir(name, message.path, parents=message.parents)
        return JSONResponse({"path": message.path})

    async def move(request: Request) -> Response:
        message = await read_message(request, MoveFile)
        name = sandboxes.container_name(path_parameter(request))
        await files.move(name, message.source, message.destination)
        return JSONResponse({"path": message.destination})

    async def edit(request: Request) -> Response:
        message = await read_message(request, EditFile)
        return respond(await files.edit(sandboxes.container_name(path_parameter(request)), message))

    async def stat(request: Request) -> Response:
        name = sandboxes.container_name(path_parameter(request))
        return respond(await files.stat(name, query_parameter(request, "path")))

    return [
        *_content_routes(sandboxes, files),
        Route(_FILES, delete, methods=["DELETE"]),
        Route(f"{_FILES}/mkdir", mkdir, methods=["POST"]),
        Route(f"{_FILES}/move", move, methods=["POST"]),
        Route(f"{_FILES}/edit", edit, methods=["POST"]),
        Route(f"{_FILES}/stat", stat),
    ]


def _content_routes(sandboxes: SandboxManager, files: FileService) -> list[Route]:
    async def read(request: Request) -> Response:
        """A file's bytes, or a directory's entries; ``X-File-*`` headers have its stat."""
        name, path = (
            sandboxes.container_name(path_parameter(request)),
            query_parameter(request, "path"),
        )
        cap = int(query_number(request, "max_bytes", -1))
        opening = files.read(name, path, max_bytes=cap if cap >= 0 else None)
        async with AsyncExitStack() as stack:
            opened = await stack.enter_async_context(opening)
            headers = stat_headers(opened.stat)
            if opened.entries is None:
                return FileResponse(opened.content, stack.pop_all(), headers)
            return respond(DirectoryEntries(opened.entries), headers=headers)

    async def write(request: Request) -> Response:
        """Write the body to a path atomically."""
        name, path = (
            sandboxes.container_name(path_parameter(request)),
            query_parameter(request, "path"),
        )
        size = await files.write(name, path, request.stream(), mode=_mode(request))
        return respond(WrittenFile(path, size))

    return [Route(_FILES, read), Route(_FILES, write, methods=["PUT"])]


class FileResponse(StreamingResponse):
    """A streamed file; its resources are closed however the response ends."""

    def __init__(
        self, content: AsyncIterator[bytes], stack: AsyncExitStack, headers: dict[str, str]
    ) -> None:
        super().__init__(content, media_type="application/octet-stream", headers=headers)
        self._stack = stack

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve (ASGI)."""
        async with self._stack:
            await super().__call__(scope, receive, send)


def stat_headers(stat: FileStat) -> dict[str, str]:
    """The response headers that describe a file."""
    return {
        "X-File-Type": "directory" if stat.is_dir else "file",
        "X-File-Size": str(stat.size),
        "X-File-Mode": f"{stat.mode:o}",
        "X-File-Modified-At": repr(stat.modified_at),
    }


def _mode(request: Request) -> int | None:
    text = request.query_params.get("mode")
    if text is None:
        return None
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o7777:
        raise InvalidRequest(
            f"{text!r} is not a file mode; give octal permission bits such as 644."
        )
    return mode
