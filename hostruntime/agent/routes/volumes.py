"""Volumes: what there is, and deleting one.  They are created with their first sandbox."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hostruntime.agent.requests import path_parameter
from hostruntime.agent.responses import no_content, respond
from hostruntime.host.tasks import in_thread
from hostruntime.volume.manager import VolumeManager
from hostruntime.wire.volumes import Volumes


def routes(volumes: VolumeManager) -> list[Route]:
    """The routes, over a host's volumes."""

    async def list_all(_: Request) -> Response:
        return respond(Volumes(tuple(await in_thread(volumes.list))))

    async def delete(request: Request) -> Response:
        await volumes.delete(path_parameter(request))
        return no_content()

    async def copy(request: Request) -> Response:
        """Leave a copy as of one instant beside the volume, for root to take away."""
        await volumes.copy(path_parameter(request))
        return no_content()

    return [
        Route("/volumes", list_all),
        Route("/volumes/{id}", delete, methods=["DELETE"]),
        Route("/volumes/{id}/copy", copy, methods=["POST"]),
    ]
