"""Commands that run in the background of a sandbox."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hostruntime.agent.requests import path_parameter, query_number, read_message
from hostruntime.agent.responses import NdjsonResponse, ndjson_line, respond
from hostruntime.errors import NotFound, TooManyCommands
from hostruntime.host.tasks import in_thread
from hostruntime.sandbox.background import MAX_PART_BYTES
from hostruntime.sandbox.manager import SandboxManager
from hostruntime.wire.background import (
    CommandFrame,
    CommandInfo,
    CommandList,
    FollowCommand,
    StartCommand,
)

_ALL = "/sandboxes/{id}/commands"
_ONE = f"{_ALL}/{{command}}"


def routes(sandboxes: SandboxManager) -> list[Route]:
    """The routes, over a host's sandboxes."""
    return [*_command_routes(sandboxes), *_output_routes(sandboxes)]


def _command_routes(sandboxes: SandboxManager) -> list[Route]:
    background = sandboxes.background

    async def start(request: Request) -> Response:
        message = await read_message(request, StartCommand)
        return respond(await sandboxes.start_command(path_parameter(request), message), 201)

    async def list_all(request: Request) -> Response:
        sandbox_id = sandboxes.require_running(path_parameter(request))
        return respond(CommandList(tuple(await in_thread(background.list_all, sandbox_id))))

    async def get(request: Request) -> Response:
        found: CommandInfo = await in_thread(background.get, *_address(sandboxes, request))
        return respond(found)

    async def kill(request: Request) -> Response:
        return respond(await background.kill(*_address(sandboxes, request)))

    return [
        Route(_ALL, start, methods=["POST"]),
        Route(_ALL, list_all),
        Route(_ONE, get),
        Route(_ONE, kill, methods=["DELETE"]),
    ]


def _output_routes(sandboxes: SandboxManager) -> list[Route]:
    background = sandboxes.background

    async def output(request: Request) -> Response:
        offset = max(int(query_number(request, "offset", 0)), 0)
        max_bytes = max(int(query_number(request, "max_bytes", MAX_PART_BYTES)), 0)
        address = _address(sandboxes, request)
        return respond(await in_thread(background.output, *address, offset, max_bytes))

    async def follow(request: Request) -> Response:
        """An error before the first frame is an error response."""
        message, address = await read_message(request, FollowCommand), _address(sandboxes, request)
        await in_thread(background.get, *address)
        frames = background.follow(*address, message.offset, message.seconds)
        return NdjsonResponse(_lines(frames))

    return [
        Route(f"{_ONE}/output", output),
        Route(f"{_ONE}/follow", follow, methods=["POST"]),
    ]


def _address(sandboxes: SandboxManager, request: Request) -> tuple[str, str]:
    sandbox_id = sandboxes.require_running(path_parameter(request))
    return sandbox_id, path_parameter(request, "command")


async def _lines(frames: AsyncGenerator[CommandFrame, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(frames):
        try:
            async for frame in frames:
                yield ndjson_line(frame)
        except NotFound:
            # The sandbox has ended, or the command was forgotten, meanwhile.
            yield ndjson_line(CommandFrame("ended"))
        except TooManyCommands as error:
            yield ndjson_line(CommandFrame("refused", message=error.detail))
