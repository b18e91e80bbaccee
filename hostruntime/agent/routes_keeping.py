"""The agent's routes for reconciliation: whose the state is, and what was set aside."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hostruntime.agent.bodies import Body, read_body
from hostruntime.agent.keeping import Keeping
from hostruntime.host.installation import Claim

_Word = Annotated[str, Field(min_length=1, max_length=100)]


class ClaimBody(Body):
    """What a database says of itself."""

    id: _Word
    epoch: Annotated[int, Field(ge=0)]
    mark: _Word
    previous: str = ""

    def claim(self) -> Claim:
        """What the book takes."""
        return Claim(self.id, self.epoch, self.mark, self.previous)


class AgreeBody(ClaimBody):
    """``POST /installation/agree``."""

    known: bool | None = None


class ReconcileBody(Body):
    """``POST /reconcile``."""

    installation: ClaimBody
    images: list[str] | None = None
    snapshots: list[str] | None = None


def keeping_routes(keeping: Keeping) -> list[Route]:
    """The routes, over a host's keeping."""

    async def standing(_: Request) -> Response:
        return JSONResponse((await keeping.standing()).to_wire())

    async def agree(request: Request) -> Response:
        body = await read_body(request, AgreeBody)
        agreed = await keeping.agree(body.claim(), known=body.known)
        return JSONResponse(agreed.to_wire())

    async def adopt(request: Request) -> Response:
        body = await read_body(request, ClaimBody)
        return JSONResponse((await keeping.adopt(body.claim())).to_wire())

    async def reconcile(request: Request) -> Response:
        body = await read_body(request, ReconcileBody)
        claim = body.installation.claim()
        return JSONResponse(asdict(await keeping.reconcile(claim, body.images, body.snapshots)))

    return [
        Route("/installation", standing, methods=["GET"]),
        Route("/installation/agree", agree, methods=["POST"]),
        Route("/installation/adopt", adopt, methods=["POST"]),
        Route("/reconcile", reconcile, methods=["POST"]),
        *_quarantine_routes(keeping),
    ]


def _quarantine_routes(keeping: Keeping) -> list[Route]:
    async def listed(_: Request) -> Response:
        return JSONResponse({"quarantine": [asdict(held) for held in await keeping.held()]})

    async def restore(request: Request) -> Response:
        return JSONResponse(asdict(await keeping.restore(str(request.path_params["key"]))))

    async def delete(request: Request) -> Response:
        await keeping.delete(str(request.path_params["key"]))
        return Response(status_code=204)

    return [
        Route("/quarantine", listed, methods=["GET"]),
        Route("/quarantine/{key}/restore", restore, methods=["POST"]),
        Route("/quarantine/{key}", delete, methods=["DELETE"]),
    ]
