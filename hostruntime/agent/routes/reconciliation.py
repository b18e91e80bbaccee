"""Reconciliation: the state's installation, and the quarantine."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hostruntime.agent.reconciliation import Reconciler
from hostruntime.agent.requests import path_parameter, read_message
from hostruntime.agent.responses import no_content, respond
from hostruntime.wire.reconciliation import Agree, Claim, Quarantine, Reconcile


def routes(reconciler: Reconciler) -> list[Route]:
    """The routes, over a host's keeping."""

    async def installation(_: Request) -> Response:
        return respond((await reconciler.installation()).info())

    async def agree(request: Request) -> Response:
        claim = await read_message(request, Agree)
        return respond((await reconciler.agree(claim, known=claim.known)).info())

    async def adopt(request: Request) -> Response:
        return respond((await reconciler.adopt(await read_message(request, Claim))).info())

    async def reconcile(request: Request) -> Response:
        return respond(await reconciler.reconcile(await read_message(request, Reconcile)))

    return [
        Route("/installation", installation, methods=["GET"]),
        Route("/installation/agree", agree, methods=["POST"]),
        Route("/installation/adopt", adopt, methods=["POST"]),
        Route("/reconcile", reconcile, methods=["POST"]),
        *_quarantine_routes(reconciler),
    ]


def _quarantine_routes(reconciler: Reconciler) -> list[Route]:
    async def list_all(_: Request) -> Response:
        return respond(Quarantine(tuple(await reconciler.quarantined())))

    async def restore(request: Request) -> Response:
        return respond(await reconciler.restore(path_parameter(request, "key")))

    async def delete(request: Request) -> Response:
        await reconciler.delete(path_parameter(request, "key"))
        return no_content()

    return [
        Route("/quarantine", list_all, methods=["GET"]),
        Route("/quarantine/{key}/restore", restore, methods=["POST"]),
        Route("/quarantine/{key}", delete, methods=["DELETE"]),
    ]
