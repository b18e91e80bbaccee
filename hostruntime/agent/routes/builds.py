"""Builds of templates."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from hostruntime.agent.requests import path_parameter, query_flag, read_message
from hostruntime.agent.responses import NDJSON, respond
from hostruntime.build.manager import BuildManager
from hostruntime.errors import InvalidRequest
from hostruntime.wire.builds import StartBuild


def routes(builds: BuildManager) -> list[Route]:
    """The routes, over a host's builds."""

    async def start(request: Request) -> Response:
        status, new = await builds.start(await read_message(request, StartBuild))
        return respond(status, 202 if new else 200)

    async def get(request: Request) -> Response:
        return respond(await builds.status(path_parameter(request)))

    async def cancel(request: Request) -> Response:
        build_id = path_parameter(request)
        await builds.cancel(build_id, keep_published=query_flag(request, "keep_published"))
        return respond(await builds.status(build_id))

    async def events(request: Request) -> Response:
        follow = query_flag(request, "follow")
        lines = await builds.events(path_parameter(request), _after(request), follow=follow)
        return StreamingResponse(lines, media_type=NDJSON)

    return [
        Route("/builds", start, methods=["POST"]),
        Route("/builds/{id}", get, methods=["GET"]),
        Route("/builds/{id}", cancel, methods=["DELETE"]),
        Route("/builds/{id}/events", events, methods=["GET"]),
    ]


def _after(request: Request) -> int:
    value = request.query_params.get("after", "0")
    if not value.isascii() or not value.isdigit():
        raise InvalidRequest("after must be a number, 0 or more.")
    return int(value)
