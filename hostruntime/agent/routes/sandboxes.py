"""Sandboxes, their snapshots, and what they have used."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hostruntime.agent.requests import body, in_path, number
from hostruntime.agent.responses import answer, nothing
from hostruntime.sandbox.manager import SandboxManager
from hostruntime.wire.sandboxes import (
    ChangesInfo,
    CollectedUsage,
    CreateSandbox,
    CreateSnapshot,
    Sandboxes,
    SetDeadline,
    Snapshots,
    Usage,
)

_LONGEST_WAIT_SECONDS = 60.0


def routes(sandboxes: SandboxManager) -> list[Route]:
    """The routes, over a host's sandboxes."""
    return [
        *_list_routes(sandboxes),
        *_sandbox_routes(sandboxes),
        *_snapshot_routes(sandboxes),
        *_usage_routes(sandboxes),
    ]


def _list_routes(sandboxes: SandboxManager) -> list[Route]:
    async def listed(_: Request) -> Response:
        return answer(Sandboxes(tuple(sandboxes.info(one) for one in sandboxes.list())))

    async def changed(request: Request) -> Response:
        """Those that ended, or were paused or resumed, after a number; waits a while for one."""
        run, seq = request.query_params.get("run", ""), int(number(request, "after", 0))
        seconds = min(max(number(request, "seconds", 0.0), 0.0), _LONGEST_WAIT_SECONDS)
        heard = await sandboxes.changes.after(run, seq, seconds)
        # One that was deleted meanwhile is known to have ended.
        ids = set(heard.ids)
        found = (sandboxes.info(one) for one in sandboxes.list() if one.request.id in ids)
        return answer(ChangesInfo(heard.run, heard.seq, heard.whole, tuple(found)))

    return [Route("/sandboxes", listed), Route("/changes", changed)]


def _sandbox_routes(sandboxes: SandboxManager) -> list[Route]:
    async def create(request: Request) -> Response:
        sandbox, new = await sandboxes.create(await body(request, CreateSandbox))
        return answer(sandboxes.info(sandbox), 201 if new else 200)

    async def get(request: Request) -> Response:
        return answer(sandboxes.info(sandboxes.get(in_path(request))))

    async def set_deadline(request: Request) -> Response:
        asked = await body(request, SetDeadline)
        return answer(
            sandboxes.info(await sandboxes.set_deadline(in_path(request), asked.deadline))
        )

    async def pause(request: Request) -> Response:
        asked = await body(request, SetDeadline)
        return answer(sandboxes.info(await sandboxes.pause(in_path(request), asked.deadline)))

    async def resume(request: Request) -> Response:
        asked = await body(request, SetDeadline)
        return answer(sandboxes.info(await sandboxes.resume(in_path(request), asked.deadline)))

    async def delete(request: Request) -> Response:
        await sandboxes.terminate(in_path(request))
        return nothing()

    return [
        Route("/sandboxes", create, methods=["POST"]),
        Route("/sandboxes/{id}", get),
        Route("/sandboxes/{id}", set_deadline, methods=["PATCH"]),
        Route("/sandboxes/{id}", delete, methods=["DELETE"]),
        Route("/sandboxes/{id}/pause", pause, methods=["POST"]),
        Route("/sandboxes/{id}/resume", resume, methods=["POST"]),
    ]


def _snapshot_routes(sandboxes: SandboxManager) -> list[Route]:
    snapshots = sandboxes.snapshots

    async def capture(request: Request) -> Response:
        asked = await body(request, CreateSnapshot)
        made, new = await sandboxes.snapshot(in_path(request), asked.id)
        return answer(made.info(), 201 if new else 200)

    async def listed(_: Request) -> Response:
        return answer(Snapshots(tuple(one.info() for one in snapshots.list())))

    async def get(request: Request) -> Response:
        return answer(snapshots.get(in_path(request)).info())

    async def delete(request: Request) -> Response:
        await snapshots.delete(in_path(request))
        return nothing()

    return [
        Route("/sandboxes/{id}/snapshots", capture, methods=["POST"]),
        Route("/snapshots", listed),
        Route("/snapshots/{id}", get),
        Route("/snapshots/{id}", delete, methods=["DELETE"]),
    ]


def _usage_routes(sandboxes: SandboxManager) -> list[Route]:
    book = sandboxes.usage

    async def usage(request: Request) -> Response:
        """What sandboxes have used, ended ones until that is collected; ``id`` asks for one."""
        meters = book.list(request.query_params.get("id"))
        return answer(Usage(tuple(meter.info() for meter in meters)))

    async def collected(request: Request) -> Response:
        """Forget the ended sandboxes among those named; the others go on."""
        await book.collected((await body(request, CollectedUsage)).ids)
        return nothing()

    return [
        Route("/usage", usage),
        Route("/usage/collected", collected, methods=["POST"]),
    ]
