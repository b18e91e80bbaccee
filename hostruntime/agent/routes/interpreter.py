"""The code interpreter of a sandbox."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hostruntime.agent.requests import path_parameter, read_message
from hostruntime.agent.responses import NdjsonResponse, ndjson_line, no_content, respond
from hostruntime.host.tasks import in_thread
from hostruntime.sandbox.manager import SandboxManager
from hostruntime.wire.interpreter import CodeFrame, ContextList, CreateContext, RunCode

_ALL = "/sandboxes/{id}/contexts"
_ONE = f"{_ALL}/{{context}}"


def routes(sandboxes: SandboxManager) -> list[Route]:
    """The routes, over a host's sandboxes."""
    interpreter = sandboxes.interpreter

    async def run(request: Request) -> Response:
        """An error before the code runs is an error response."""
        frames = sandboxes.run_code(path_parameter(request), await read_message(request, RunCode))
        try:
            started = await anext(frames)
        except BaseException:
            await frames.aclose()
            raise
        return NdjsonResponse(_lines(started, frames))

    async def create(request: Request) -> Response:
        message = await read_message(request, CreateContext)
        access = sandboxes.code_access(path_parameter(request))
        return respond(await interpreter.create(access, message), 201)

    async def list_all(request: Request) -> Response:
        sandbox_id = sandboxes.require_running(path_parameter(request))
        return respond(ContextList(tuple(await in_thread(interpreter.list_all, sandbox_id))))

    async def restart(request: Request) -> Response:
        access = sandboxes.code_access(path_parameter(request))
        return respond(await interpreter.restart(access, path_parameter(request, "context")))

    async def remove(request: Request) -> Response:
        access = sandboxes.code_access(path_parameter(request))
        await interpreter.remove(access.id, path_parameter(request, "context"))
        return no_content()

    return [
        Route("/sandboxes/{id}/code", run, methods=["POST"]),
        Route(_ALL, create, methods=["POST"]),
        Route(_ALL, list_all),
        Route(f"{_ONE}/restart", restart, methods=["POST"]),
        Route(_ONE, remove, methods=["DELETE"]),
    ]


async def _lines(
    started: CodeFrame, frames: AsyncGenerator[CodeFrame, None]
) -> AsyncGenerator[bytes, None]:
    async with aclosing(frames):
        yield ndjson_line(started)
        async for frame in frames:
            # A figure can have megabytes.
            yield (
                ndjson_line(frame) if frame.result is None else await in_thread(ndjson_line, frame)
            )
