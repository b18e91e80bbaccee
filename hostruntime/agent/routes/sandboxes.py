"""Sandboxes, their snapshots and their usage."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hostruntime.agent.requests import path_parameter, query_number, read_message
from hostruntime.agent.responses import no_content, respond
from hostruntime.sandbox.manager import SandboxManager
from hostruntime.wire.sandboxes import (
    ChangesInfo,
    CollectedUsage,
    CreateSandbox,
    CreateSnapshot,
    DeletedSandbox,
    Sandboxes,
    SetDeadline,
    Snapshots,
    Usage,
)

_MAX_WAIT_SECONDS = 60.0


def routes(sandboxes: SandboxManager) -> list[Route]:
    """The routes, over a host's sandboxes."""
    return [
        *_list_routes(sandboxes),
        *_sandbox_routes(sandboxes),
        _deletion(sandboxes),
        *_snapshot_routes(sandboxes),
        *_usage_routes(sandboxes),
    ]


def _list_routes(sandboxes: SandboxManager) -> list[Route]:
    async def list_all(_: Request) -> Response:
        return respond(Sandboxes(tuple(sandboxes.info(item) for item in sandboxes.list())))

    async def changed(request: Request) -> Response:
        """Sandboxes that ended, were paused or resumed after a number; waits for the first."""
        run, seq = request.query_params.get("run", ""), int(query_number(request, "after", 0))
        seconds = min(max(query_number(request, "seconds", 0.0), 0.0), _MAX_WAIT_SECONDS)
        changes = await sandboxes.changes.after(run, seq, seconds)
        # Deleted ones are left out: whoever deleted them knows that they have ended.
        ids = set(changes.ids)
        changed_sandboxes = (
            sandboxes.info(item) for item in sandboxes.list() if item.request.id in ids
        )
        return respond(
            ChangesInfo(changes.run, changes.seq, changes.complete, tuple(changed_sandboxes))
        )

    return [Route("/sandboxes", list_all), Route("/changes", changed)]


def _sandbox_routes(sandboxes: SandboxManager) -> list[Route]:
    async def create(request: Request) -> Response:
        sandbox, new = await sandboxes.create(await read_message(request, CreateSandbox))
        return respond(sandboxes.info(sandbox), 201 if new else 200)

    async def get(request: Request) -> Response:
        return respond(sandboxes.info(sandboxes.get(path_parameter(request))))

    async def set_deadline(request: Request) -> Response:
        message = await read_message(request, SetDeadline)
        return respond(
            sandboxes.info(await sandboxes.set_deadline(path_parameter(request), message.deadline))
        )

    async def pause(request: Request) -> Response:
        message = await read_message(request, SetDeadline)
        return respond(
            sandboxes.info(await sandboxes.pause(path_parameter(request), message.deadline))
        )

    async def resume(request: Request) -> Response:
        message = await read_message(request, SetDeadline)
        return respond(
            sandboxes.info(await sandboxes.resume(path_parameter(request), message.deadline))
        )

    return [
        Route("/sandboxes", create, methods=["POST"]),
        Route("/sandboxes/{id}", get),
        Route("/sandboxes/{id}", set_deadline, methods=["PATCH"]),
        Route("/sandboxes/{id}/pause", pause, methods=["POST"]),
        Route("/sandboxes/{id}/resume", resume, methods=["POST"]),
    ]


def _deletion(sandboxes: SandboxManager) -> Route:
    async def delete(request: Request) -> Response:
        """``collected`` names ended ones, by commas, whose usage may be forgotten."""
        sandbox_id, usage = path_parameter(request), sandboxes.usage
        collected = request.query_params.get("collected", "").split(",")
        await asyncio.gather(sandboxes.terminate(sandbox_id), usage.forget_if_possible(collected))
        return respond(DeletedSandbox(usage.info(sandbox_id)))

    return Route("/sandboxes/{id}", delete, methods=["DELETE"])


def _snapshot_routes(sandboxes: SandboxManager) -> list[Route]:
    snapshots = sandboxes.snapshots

    async def capture(request: Request) -> Response:
        message = await read_message(request, CreateSnapshot)
        snapshot, new = await sandboxes.snapshot(path_parameter(request), message.id)
        return respond(snapshot.info(), 201 if new else 200)

    async def list_all(_: Request) -> Response:
        return respond(Snapshots(tuple(item.info() for item in snapshots.list())))

    async def get(request: Request) -> Response:
        return respond(snapshots.get(path_parameter(request)).info())

    async def delete(request: Request) -> Response:
        await snapshots.delete(path_parameter(request))
        return no_content()

    return [
        Route("/sandboxes/{id}/snapshots", capture, methods=["POST"]),
        Route("/snapshots", list_all),
        Route("/snapshots/{id}", get),
        Route("/snapshots/{id}", delete, methods=["DELETE"]),
    ]


def _usage_routes(sandboxes: SandboxManager) -> list[Route]:
    usage_store = sandboxes.usage

    async def usage(request: Request) -> Response:
        """Usage of all sandboxes, including uncollected ended ones; ``id`` selects one."""
        meters = usage_store.list(request.query_params.get("id"))
        return respond(Usage(tuple(meter.info() for meter in meters)))

    async def metrics(request: Request) -> Response:
        """What one sandbox uses, and has used in the last minute."""
        sandbox_id = path_parameter(request)
        sandboxes.require_present(sandbox_id)
        return respond(await usage_store.metrics(sandbox_id))

    async def collected(request: Request) -> Response:
        """Forget those of the listed sandboxes that have ended."""
        await usage_store.forget_collected((await read_message(request, CollectedUsage)).ids)
        return no_content()

    return [
        Route("/usage", usage),
        Route("/sandboxes/{id}/metrics", metrics),
        Route("/usage/collected", collected, methods=["POST"]),
    ]
