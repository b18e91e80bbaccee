"""Files that are sent into and out of a sandbox as a stream, whatever their size."""

from __future__ import annotations

from contextlib import AsyncExitStack

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hostruntime.agent.requests import (
    path_parameter,
    query_integer,
    query_number,
    query_parameter,
)
from hostruntime.agent.responses import respond
from hostruntime.agent.routes.files import FileResponse, stat_headers
from hostruntime.container.files import FileService
from hostruntime.container.transfers import TransferService
from hostruntime.sandbox.manager import SandboxManager
from hostruntime.wire.files import WantedPart, WrittenFile

_TRANSFER = "/sandboxes/{id}/transfer"


def routes(sandboxes: SandboxManager, files: FileService) -> list[Route]:
    """The routes, over a host's sandboxes."""
    transfers = TransferService(files)

    async def download(request: Request) -> Response:
        """The bytes of a file that a ``WantedPart`` names; ``X-File-*`` headers describe them.

        In chunks, without a Content-Length: if the file is cut meanwhile, there are fewer.
        """
        name = sandboxes.container_name(path_parameter(request))
        path = query_parameter(request, "path")
        wanted = _wanted(request)
        async with AsyncExitStack() as stack:
            opened = await stack.enter_async_context(transfers.download(name, path, wanted))
            headers = {
                **stat_headers(opened.part.stat),
                "X-File-First": str(opened.part.first),
                "X-File-Length": str(opened.part.length),
            }
            return FileResponse(opened.content, stack.pop_all(), headers)
        raise AssertionError("unreachable: the block does not suppress exceptions")

    async def upload(request: Request) -> Response:
        """Write the body to a path, whole or not at all."""
        name = sandboxes.container_name(path_parameter(request))
        path = query_parameter(request, "path")
        length = request.headers.get("content-length")
        size = None if length is None else int(length)
        return respond(
            WrittenFile(path, await transfers.upload(name, path, request.stream(), size))
        )

    return [Route(_TRANSFER, download), Route(_TRANSFER, upload, methods=["PUT"])]


def _wanted(request: Request) -> WantedPart:
    names = ("first", "last", "lines", "most")
    numbers = {name: query_integer(request, name) for name in names}
    line = query_number(request, "line", 0)
    return WantedPart(**numbers, line=int(line) or None)
