"""Files in a sandbox."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from hostruntime.agent.requests import body, in_path, number, parameter
from hostruntime.agent.responses import answer, nothing
from hostruntime.container.files import FileService
from hostruntime.errors import InvalidRequest
from hostruntime.sandbox.manager import SandboxManager
from hostruntime.wire.files import (
    DirectoryEntries,
    FileStat,
    MakeDirectory,
    MoveFile,
    WrittenFile,
)

_FILES = "/sandboxes/{id}/files"


def routes(sandboxes: SandboxManager, files: FileService) -> list[Route]:
    """The routes, over a host's sandboxes."""

    async def delete(request: Request) -> Response:
        name = sandboxes.container_name(in_path(request))
        await files.delete(name, parameter(request, "path"))
        return nothing()

    async def mkdir(request: Request) -> Response:
        asked = await body(request, MakeDirectory)
        name = sandboxes.container_name(in_path(request))
        await files.mkdir(name, asked.path, parents=asked.parents)
        return JSONResponse({"path": asked.path})

    async def move(request: Request) -> Response:
        asked = await body(request, MoveFile)
        name = sandboxes.container_name(in_path(request))
        await files.move(name, asked.source, asked.destination)
        return JSONResponse({"path": asked.destination})

    async def stat(request: Request) -> Response:
        name = sandboxes.container_name(in_path(request))
        return answer(await files.stat(name, parameter(request, "path")))

    return [
        *_content_routes(sandboxes, files),
        Route(_FILES, delete, methods=["DELETE"]),
        Route(f"{_FILES}/mkdir", mkdir, methods=["POST"]),
        Route(f"{_FILES}/move", move, methods=["POST"]),
        Route(f"{_FILES}/stat", stat),
    ]


def _content_routes(sandboxes: SandboxManager, files: FileService) -> list[Route]:
    async def read(request: Request) -> Response:
        """A file's bytes, or a directory's entries; ``X-File-*`` say what it is."""
        name, path = sandboxes.container_name(in_path(request)), parameter(request, "path")
        cap = int(number(request, "max_bytes", -1))
        opening = files.read(name, path, max_bytes=cap if cap >= 0 else None)
        async with AsyncExitStack() as stack:
            opened = await stack.enter_async_context(opening)
            headers = _stat_headers(opened.stat)
            if opened.entries is None:
                return _FileResponse(opened.content, stack.pop_all(), headers)
            return answer(DirectoryEntries(opened.entries), headers=headers)

    async def write(request: Request) -> Response:
        """Write the body to a path, whole or not at all."""
        name, path = sandboxes.container_name(in_path(request)), parameter(request, "path")
        size = await files.write(name, path, request.stream(), mode=_mode(request))
        return answer(WrittenFile(path, size))

    return [Route(_FILES, read), Route(_FILES, write, methods=["PUT"])]


class _FileResponse(StreamingResponse):
    """A file on its way; what it was opened with is closed whichever way the sending ends."""

    def __init__(
        self, content: AsyncIterator[bytes], stack: AsyncExitStack, headers: dict[str, str]
    ) -> None:
        super().__init__(content, media_type="application/octet-stream", headers=headers)
        self._stack = stack

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async with self._stack:
            await super().__call__(scope, receive, send)


def _stat_headers(stat: FileStat) -> dict[str, str]:
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
