"""Reconciliation: whose the state is, and what was set aside."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hostruntime.agent.keeping import Keeping
from hostruntime.agent.requests import body, in_path
from hostruntime.agent.responses import answer, nothing
from hostruntime.wire.keeping import Agree, Claim, Quarantine, Reconcile


def routes(keeping: Keeping) -> list[Route]:
    """The routes, over a host's keeping."""

    async def standing(_: Request) -> Response:
        return answer((await keeping.standing()).info())

    async def agree(request: Request) -> Response:
        claim = await body(request, Agree)
        return answer((await keeping.agree(claim, known=claim.known)).info())

    async def adopt(request: Request) -> Response:
        return answer((await keeping.adopt(await body(request, Claim))).info())

    async def reconcile(request: Request) -> Response:
        return answer(await keeping.reconcile(await body(request, Reconcile)))

    return [
        Route("/installation", standing, methods=["GET"]),
        Route("/installation/agree", agree, methods=["POST"]),
        Route("/installation/adopt", adopt, methods=["POST"]),
        Route("/reconcile", reconcile, methods=["POST"]),
        *_quarantine_routes(keeping),
    ]


def _quarantine_routes(keeping: Keeping) -> list[Route]:
    async def listed(_: Request) -> Response:
        return answer(Quarantine(tuple(await keeping.held())))

    async def restore(request: Request) -> Response:
        return answer(await keeping.restore(in_path(request, "key")))

    async def delete(request: Request) -> Response:
        await keeping.delete(in_path(request, "key"))
        return nothing()

    return [
        Route("/quarantine", listed, methods=["GET"]),
        Route("/quarantine/{key}/restore", restore, methods=["POST"]),
        Route("/quarantine/{key}", delete, methods=["DELETE"]),
    ]
