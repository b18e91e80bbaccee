"""Sandboxes and their snapshots over REST."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from time import monotonic
from typing import Any

from channels.db import database_sync_to_async
from django.conf import settings
from django.http import HttpRequest, HttpResponse, HttpResponseBase

from orkestr_console.accounts.actor import READ, WRITE
from orkestr_console.core.errors import DomainError, InvalidInput
from orkestr_console.core.hosts import run_async
from orkestr_console.http.decorators import ApiRequest, api, revalidate
from orkestr_console.http.json_api import json_response, no_content, read_json, timestamp
from orkestr_console.http.paging import read_limit
from orkestr_console.http.streams import OwningStream
from sandboxes_app import presenters, services
from sandboxes_app.specs import (
    BatchSpec,
    DirectorySpec,
    ExecSpec,
    FileSpec,
    MoveSpec,
    SandboxSpec,
    SnapshotSpec,
    TimeoutSpec,
)

# Well under the 30 s after which the official SDK gives up on a silent connection.
KEEP_ALIVE_SECONDS = 10.0
KEEP_ALIVE = b": the command still runs\n\n"


@api(scope=WRITE)
def create_sandbox(request: ApiRequest) -> HttpResponse:
    """``POST /v1/sandboxes``: answers once it is running."""
    spec = read_json(request, SandboxSpec)
    sandbox = services.create_sandbox(request.actor, spec)
    return json_response(presenters.sandbox_detail(sandbox), status=201)


@api(scope=READ)
def list_sandboxes(request: ApiRequest) -> HttpResponse:
    """``GET /v1/sandboxes``: filtered by ``status`` and ``metadata[key]=value``."""
    rows, cursor = services.list_sandboxes(
        request.actor,
        status=request.GET.get("status") or None,
        metadata=metadata_filter(request),
        limit=read_limit(request.GET.get("limit")),
        cursor=request.GET.get("cursor"),
    )
    listed = [presenters.sandbox_detail(row) for row in rows]
    return json_response({"sandboxes": listed, "next_cursor": cursor})


def metadata_filter(request: ApiRequest) -> dict[str, str]:
    """The ``metadata[key]=value`` pairs. Raises ``InvalidInput`` for one given twice."""
    pairs: dict[str, str] = {}
    for name, values in request.GET.lists():
        if not (name.startswith("metadata[") and name.endswith("]")):
            continue
        if len(set(values)) > 1:
            raise InvalidInput(f"{name} is given with two values; nothing can match both.")
        pairs[name.removeprefix("metadata[").removesuffix("]")] = values[0]
    return pairs


@api(scope=READ)
def get_limits(request: ApiRequest) -> HttpResponse:
    """``GET /v1/sandboxes/limits``."""
    return json_response(presenters.limits_detail(services.limits(request.actor)))


@api(scope=READ)
def get_sandbox(request: ApiRequest, sandbox_id: str) -> HttpResponse:
    """``GET /v1/sandboxes/{id}``."""
    return json_response(presenters.sandbox_detail(services.get_sandbox(request.actor, sandbox_id)))


@api(scope=WRITE)
def terminate_sandbox(request: ApiRequest, sandbox_id: str) -> HttpResponse:
    """``DELETE /v1/sandboxes/{id}``: idempotent; the row stays in history."""
    services.terminate_sandbox(request.actor, sandbox_id)
    return no_content()


@api(scope=WRITE)
def set_timeout(request: ApiRequest, sandbox_id: str) -> HttpResponse:
    """``POST …/timeout``: a new lifetime, from now."""
    spec = read_json(request, TimeoutSpec)
    sandbox = services.set_timeout(request.actor, sandbox_id, spec)
    return json_response({"expires_at": timestamp(sandbox.expires_at)})


@api(scope=WRITE)
def pause_sandbox(request: ApiRequest, sandbox_id: str) -> HttpResponse:
    """``POST …/pause``: answers once it is paused."""
    return json_response({"sandbox_id": services.pause_sandbox(request.actor, sandbox_id).pk})


@api(scope=WRITE)
def resume_sandbox(request: ApiRequest, sandbox_id: str) -> HttpResponse:
    """``POST …/resume``: answers once it is running again."""
    sandbox = services.resume_sandbox(request.actor, sandbox_id)
    return json_response(presenters.sandbox_detail(sandbox))


@api(scope=WRITE)
def exec_command(request: ApiRequest, sandbox_id: str) -> HttpResponseBase:
    """``POST …/exec``: buffered, or as server-sent events with ``stream: true``."""
    spec = read_json(request, ExecSpec)
    if spec.stream:
        frames = services.exec_stream(request.actor, sandbox_id, spec)
        # On the server's own event loop, where the response continues to read.
        return run_async(streaming_response, request, frames)
    return json_response(
        presenters.exec_answer(services.exec_command(request.actor, sandbox_id, spec))
    )


async def streaming_response(request: HttpRequest, frames: services.CommandStream) -> OwningStream:
    """Start the stream once its first frame arrives: until then, an error is a normal response."""
    first = await anext(frames)
    return OwningStream(
        event_stream(request, first, frames),
        frames,
        content_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def event_stream(
    request: HttpRequest, first: dict[str, Any], frames: services.CommandStream
) -> AsyncIterator[bytes]:
    """Each frame as an event (HTML Living Standard, 9.2): one JSON object in a ``data:`` line.

    Comments keep a silent command's connection alive. The token is re-checked about as often, and
    the stream ends with an error once it is no longer valid. However this ends, the command's
    process tree is killed with it.
    """
    async with aclosing(frames):
        yield encode_event(first)
        next_frame = asyncio.ensure_future(anext(frames, None))
        trusted_until = monotonic() + KEEP_ALIVE_SECONDS
        try:
            while True:
                await asyncio.wait({next_frame}, timeout=KEEP_ALIVE_SECONDS)
                if not next_frame.done() or monotonic() >= trusted_until:
                    if error := await database_sync_to_async(access_error)(request):
                        frames.close_reason = error.detail
                        yield encode_event(
                            {"kind": "error", "code": error.code, "message": error.detail}
                        )
                        return
                    trusted_until = monotonic() + KEEP_ALIVE_SECONDS
                if not next_frame.done():
                    yield KEEP_ALIVE
                    continue
                if (frame := next_frame.result()) is None:
                    return
                yield encode_event(frame)
                next_frame = asyncio.ensure_future(anext(frames, None))
        finally:
            next_frame.cancel()
            await asyncio.wait({next_frame})


def access_error(request: HttpRequest) -> DomainError | None:
    """Why the token may no longer run the command; None while it may."""
    return revalidate(request, lambda actor: actor.require(WRITE))


def encode_event(frame: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(frame, separators=(",", ":")).encode() + b"\n\n"


@api(scope=READ)
def read_path(request: ApiRequest, sandbox_id: str) -> HttpResponse:
    """``GET …/files?path=``: a file or a directory."""
    found = services.read_path(request.actor, sandbox_id, request.GET.get("path"))
    return json_response(presenters.path_content(found))


@api(scope=WRITE)
def write_file(request: ApiRequest, sandbox_id: str) -> HttpResponse:
    """``POST …/files``."""
    spec = read_json(request, FileSpec, max_bytes=settings.LARGEST_BODY)
    written = services.write_file(request.actor, sandbox_id, spec)
    return json_response({"path": spec.path, "bytes_written": written})


@api(scope=WRITE)
def delete_path(request: ApiRequest, sandbox_id: str) -> HttpResponse:
    """``DELETE …/files?path=``."""
    services.delete_path(request.actor, sandbox_id, request.GET.get("path"))
    return no_content()


@api(scope=WRITE)
def mkdir(request: ApiRequest, sandbox_id: str) -> HttpResponse:
    """``POST …/files/mkdir``."""
    services.mkdir(request.actor, sandbox_id, read_json(request, DirectorySpec))
    return no_content()


@api(scope=WRITE)
def move(request: ApiRequest, sandbox_id: str) -> HttpResponse:
    """``POST …/files/move``."""
    services.move(request.actor, sandbox_id, read_json(request, MoveSpec))
    return no_content()


@api(scope=READ)
def stat(request: ApiRequest, sandbox_id: str) -> HttpResponse:
    """``GET …/files/stat?path=``: a missing path is ``exists: false``, not an error."""
    found = services.stat(request.actor, sandbox_id, request.GET.get("path"))
    return json_response(presenters.path_stat(found))


@api(scope=WRITE)
def write_batch(request: ApiRequest, sandbox_id: str) -> HttpResponse:
    """``POST …/files/batch``: each file succeeds or fails on its own."""
    spec = read_json(request, BatchSpec, max_bytes=settings.LARGEST_BODY)
    return json_response(
        presenters.batch_rows(services.write_batch(request.actor, sandbox_id, spec))
    )


@api(scope=READ)
def list_egress(request: ApiRequest, sandbox_id: str) -> HttpResponse:
    """``GET …/egress``: hosts, counts and bytes; an extension of the public API."""
    return json_response(presenters.egress_hosts(services.list_egress(request.actor, sandbox_id)))


@api(scope=READ)
def get_template_use(request: ApiRequest, template_id: str) -> HttpResponse:
    """``GET /v1/templates/{id}/usage``: what uses it; an extension of the public API."""
    use = services.template_use(request.actor, template_id)
    return json_response(presenters.template_use_detail(use))


@api(scope=WRITE)
def create_snapshot(request: ApiRequest, sandbox_id: str) -> HttpResponse:
    """``POST /v1/sandboxes/{id}/snapshots``: answers once sandboxes can start from it."""
    spec = read_json(request, SnapshotSpec)
    snapshot = services.create_snapshot(request.actor, sandbox_id, spec)
    return json_response(presenters.snapshot_detail(snapshot), status=201)


@api(scope=READ)
def list_snapshots(request: ApiRequest) -> HttpResponse:
    """``GET /v1/sandboxes/snapshots``."""
    rows, cursor = services.list_snapshots(
        request.actor,
        limit=read_limit(request.GET.get("limit")),
        cursor=request.GET.get("cursor"),
    )
    listed = [presenters.snapshot_detail(row) for row in rows]
    return json_response({"snapshots": listed, "next_cursor": cursor})


@api(scope=READ)
def get_snapshot(request: ApiRequest, snapshot_id: str) -> HttpResponse:
    """``GET /v1/sandboxes/snapshots/{id}``."""
    snapshot = services.get_snapshot(request.actor, snapshot_id)
    return json_response(presenters.snapshot_detail(snapshot))


@api(scope=WRITE)
def delete_snapshot(request: ApiRequest, snapshot_id: str) -> HttpResponse:
    """``DELETE /v1/sandboxes/snapshots/{id}``: idempotent."""
    services.delete_snapshot(request.actor, snapshot_id)
    return no_content()
