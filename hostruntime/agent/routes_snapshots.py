"""The agent's routes for snapshots of sandboxes."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hostruntime.agent.bodies import SnapshotBody, read_body
from hostruntime.sandbox.manager import SandboxManager


def snapshot_routes(sandboxes: SandboxManager) -> list[Route]:
    """The routes, over a host's sandboxes."""
    snapshots = sandboxes.snapshots

    async def capture(request: Request) -> Response:
        body = await read_body(request, SnapshotBody)
        made, new = await sandboxes.snapshot(str(request.path_params["id"]), body.id)
        return JSONResponse(made.to_wire(), 201 if new else 200)

    async def listed(_: Request) -> Response:
        return JSONResponse({"snapshots": [one.to_wire() for one in snapshots.list()]})

    async def get(request: Request) -> Response:
        return JSONResponse(snapshots.get(str(request.path_params["id"])).to_wire())

    async def delete(request: Request) -> Response:
        await snapshots.delete(str(request.path_params["id"]))
        return Response(status_code=204)

    return [
        Route("/sandboxes/{id}/snapshots", capture, methods=["POST"]),
        Route("/snapshots", listed),
        Route("/snapshots/{id}", get),
        Route("/snapshots/{id}", delete, methods=["DELETE"]),
    ]
