"""Sandboxes and their snapshots over REST."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from time import monotonic
from typing import Any

from django.conf import settings
from django.http import HttpRequest, HttpResponse, HttpResponseBase

from orkestr_console.accounts.actor import READ, WRITE
from orkestr_console.core.addresses import console_address
from orkestr_console.core.errors import DomainError, InvalidInput, LengthRequired
from orkestr_console.core.hosts import Steps
from orkestr_console.http.decorators import ApiRequest, admits_itself, api, revalidate
from orkestr_console.http.json_api import json_response, no_content, read_json, timestamp
from orkestr_console.http.paging import read_limit
from orkestr_console.http.ranges import EVERYTHING, wanted_part
from orkestr_console.http.streams import OwningStream
from orkestr_console.http.threads import in_thread
from orkestr_console.http.uploads import cut_off, request_body
from sandboxes_app import presenters, services
from sandboxes_app.models import Sandbox
from sandboxes_app.specs import (
    BatchSpec,
    DirectorySpec,
    ExecSpec,
    FileSpec,
    MoveSpec,
    PresignSpec,
    SandboxSpec,
    SnapshotSpec,
    TimeoutSpec,
)

# Well under the 30 s after which the official SDK gives up on a silent connection.
KEEP_ALIVE_SECONDS = 10.0
KEEP_ALIVE = b": the command still runs\n\n"


@api(scope=WRITE)
def create_sandbox(request: ApiRequest) -> Steps[HttpResponse]:
    """``POST /v1/sandboxes``: answers once it is running."""
    spec = read_json(request, SandboxSpec)
    sandbox = yield from services.create_sandbox.steps(request.actor, spec)
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


@api(scope=READ, subject=Sandbox)
def get_sandbox(request: ApiRequest, sandbox_id: str) -> HttpResponse:
    """``GET /v1/sandboxes/{id}``."""
    return json_response(presenters.sandbox_detail(services.get_sandbox(request.actor, sandbox_id)))


@api(scope=WRITE, subject=Sandbox)
def terminate_sandbox(request: ApiRequest, sandbox_id: str) -> Steps[HttpResponse]:
    """``DELETE /v1/sandboxes/{id}``: idempotent; the row stays in history."""
    yield from services.terminate_sandbox.steps(request.actor, sandbox_id)
    return no_content()


@api(scope=WRITE, subject=Sandbox)
def set_timeout(request: ApiRequest, sandbox_id: str) -> Steps[HttpResponse]:
    """``POST …/timeout``: a new lifetime, from now."""
    spec = read_json(request, TimeoutSpec)
    sandbox = yield from services.set_timeout.steps(request.actor, sandbox_id, spec)
    return json_response({"expires_at": timestamp(sandbox.expires_at)})


@api(scope=WRITE, subject=Sandbox)
def pause_sandbox(request: ApiRequest, sandbox_id: str) -> Steps[HttpResponse]:
    """``POST …/pause``: answers once it is paused."""
    sandbox = yield from services.pause_sandbox.steps(request.actor, sandbox_id)
    return json_response({"sandbox_id": sandbox.pk})


@api(scope=WRITE, subject=Sandbox)
def resume_sandbox(request: ApiRequest, sandbox_id: str) -> Steps[HttpResponse]:
    """``POST …/resume``: answers once it is running again."""
    sandbox = yield from services.resume_sandbox.steps(request.actor, sandbox_id)
    return json_response(presenters.sandbox_detail(sandbox))


def begin_command(
    request: ApiRequest, sandbox_id: str
) -> services.Command | services.CommandStream:
    """What runs in a thread before a command does: it is read, and allowed."""
    spec = read_json(request, ExecSpec)
    if spec.stream:
        return services.exec_stream(request.actor, sandbox_id, spec)
    return services.prepare_command(request.actor, sandbox_id, spec)


@api(scope=WRITE, first=begin_command, subject=Sandbox)
async def exec_command(
    request: ApiRequest, command: services.Command | services.CommandStream
) -> HttpResponseBase:
    """``POST …/exec``: buffered, or as server-sent events with ``stream: true``."""
    if isinstance(command, services.CommandStream):
        return await streaming_response(request, command)
    return await in_thread(command_answer, command, await services.run_command(command))


def command_answer(command: services.Command, outcome: services.Outcome) -> HttpResponse:
    """What runs in a thread after a command: it is recorded, and its output encoded."""
    return json_response(presenters.exec_answer(services.conclude_command(command, outcome)))


async def streaming_response(request: HttpRequest, frames: services.CommandStream) -> OwningStream:
    """Start the stream once its first frame arrives: until then, an error is a normal response."""
    return sent_as_events(request, await anext(frames), frames, WRITE)


def sent_as_events(
    request: HttpRequest, first: dict[str, Any], frames: services.CommandStream, scope: str
) -> OwningStream:
    """The response of a stream; ``scope`` is what the token must go on to have."""
    return OwningStream(
        event_stream(request, first, frames, scope),
        frames,
        content_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def event_stream(
    request: HttpRequest, first: dict[str, Any], frames: services.CommandStream, scope: str = WRITE
) -> AsyncIterator[bytes]:
    """Each frame as an event (HTML Living Standard, 9.2): one JSON object in a ``data:`` line.

    Comments keep a silent command's connection alive. The token is re-checked about as often, and
    the stream ends with an error once it is no longer valid. However this ends, ``frames`` are
    closed, which kills the process tree of a command that runs only for them.
    """
    async with aclosing(frames):
        yield encode_event(first)
        next_frame = asyncio.ensure_future(anext(frames, None))
        trusted_until = monotonic() + KEEP_ALIVE_SECONDS
        try:
            while True:
                await asyncio.wait({next_frame}, timeout=KEEP_ALIVE_SECONDS)
                if not next_frame.done() or monotonic() >= trusted_until:
                    if error := await in_thread(access_error, request, scope):
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


def access_error(request: HttpRequest, scope: str = WRITE) -> DomainError | None:
    """Why the token may no longer run the command, or read what it prints; None while it may."""
    return revalidate(request, lambda actor: actor.require(scope))


def encode_event(frame: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(frame, separators=(",", ":")).encode() + b"\n\n"


@api(scope=READ, subject=Sandbox)
def read_path(request: ApiRequest, sandbox_id: str) -> Steps[HttpResponse]:
    """``GET …/files?path=``: a file or a directory."""
    found = yield from services.read_path.steps(request.actor, sandbox_id, request.GET.get("path"))
    return json_response(presenters.path_content(found))


@api(scope=WRITE, subject=Sandbox)
def write_file(request: ApiRequest, sandbox_id: str) -> Steps[HttpResponse]:
    """``POST …/files``."""
    spec = read_json(request, FileSpec, max_bytes=settings.LARGEST_BODY)
    written = yield from services.write_file.steps(request.actor, sandbox_id, spec)
    return json_response({"path": spec.path, "bytes_written": written})


@api(scope=WRITE, subject=Sandbox)
def delete_path(request: ApiRequest, sandbox_id: str) -> Steps[HttpResponse]:
    """``DELETE …/files?path=``."""
    yield from services.delete_path.steps(request.actor, sandbox_id, request.GET.get("path"))
    return no_content()


@api(scope=WRITE, subject=Sandbox)
def mkdir(request: ApiRequest, sandbox_id: str) -> Steps[HttpResponse]:
    """``POST …/files/mkdir``."""
    yield from services.mkdir.steps(request.actor, sandbox_id, read_json(request, DirectorySpec))
    return no_content()


@api(scope=WRITE, subject=Sandbox)
def move(request: ApiRequest, sandbox_id: str) -> Steps[HttpResponse]:
    """``POST …/files/move``."""
    yield from services.move.steps(request.actor, sandbox_id, read_json(request, MoveSpec))
    return no_content()


@api(scope=READ, subject=Sandbox)
def stat(request: ApiRequest, sandbox_id: str) -> Steps[HttpResponse]:
    """``GET …/files/stat?path=``: a missing path is ``exists: false``, not an error."""
    found = yield from services.stat.steps(request.actor, sandbox_id, request.GET.get("path"))
    return json_response(presenters.path_stat(found))


@api(scope=WRITE, subject=Sandbox)
def write_batch(request: ApiRequest, sandbox_id: str) -> Steps[HttpResponse]:
    """``POST …/files/batch``: each file succeeds or fails on its own."""
    spec = read_json(request, BatchSpec, max_bytes=settings.LARGEST_BODY)
    rows = yield from services.write_batch.steps(request.actor, sandbox_id, spec)
    return json_response(presenters.batch_rows(rows))


@api(scope=WRITE, subject=Sandbox)
def presign_upload(request: ApiRequest, sandbox_id: str) -> Steps[HttpResponse]:
    """``POST …/files/presign-upload``."""
    spec = read_json(request, PresignSpec)
    address = yield from services.presign_upload.steps(request.actor, sandbox_id, spec)
    return json_response(presenters.presigned(address, console_address(request)))


@api(scope=READ, subject=Sandbox)
def presign_download(request: ApiRequest, sandbox_id: str) -> Steps[HttpResponse]:
    """``POST …/files/presign-download``."""
    spec = read_json(request, PresignSpec)
    address = yield from services.presign_download.steps(request.actor, sandbox_id, spec)
    return json_response(presenters.presigned(address, console_address(request)))


@admits_itself
async def upload(request: HttpRequest, address: str) -> HttpResponse:
    """``PUT /v1/transfers/{address}``: the body is the file."""
    length = request.META.get("CONTENT_LENGTH", "")
    if not length.isdigit():
        raise LengthRequired
    transfer = await services.begin_upload(address, request.META.get("REMOTE_ADDR"))
    outcome = await services.run_upload(transfer, int(length), request_body(request))
    return await in_thread(upload_answer, transfer, outcome)


def upload_answer(transfer: services.Transfer, outcome: services.UploadOutcome) -> HttpResponse:
    """What runs in a thread after an upload: it is recorded."""
    written = services.conclude_upload(transfer, outcome)
    return json_response({"path": transfer.address.path, "bytes_written": written})


@admits_itself
async def download(request: HttpRequest, address: str) -> HttpResponseBase:
    """``GET /v1/transfers/{address}``: the file, or the part that a ``Range`` header asks for."""
    client = request.META.get("REMOTE_ADDR")
    file = services.Download(await in_thread(services.begin_download, address, client))
    wanted = wanted_part(request.headers.get("Range"))
    part = await file.open(wanted)
    headers = presenters.file_headers(file.path, part, partial=wanted != EVERYTHING)
    status = 200 if wanted == EVERYTHING else 206
    if request.method == "HEAD":
        await file.aclose()
        return HttpResponse(status=status, headers=headers)
    return OwningStream(
        file_content(request, file, part.length), file, status=status, headers=headers
    )


async def file_content(
    request: HttpRequest, file: services.Download, left: int
) -> AsyncIterator[bytes]:
    """The bytes. If there are fewer than promised, the end of the connection says so."""
    async for piece in file.pieces():
        yield piece
        left -= len(piece)
    if left:
        cut_off(request)


@api(scope=READ, subject=Sandbox)
def get_metrics(request: ApiRequest, sandbox_id: str) -> Steps[HttpResponse]:
    """``GET …/metrics?since=``: null figures unless it is running."""
    since = request.GET.get("since")
    metrics = yield from services.get_metrics.steps(request.actor, sandbox_id, since)
    return json_response(presenters.metrics_detail(metrics))


@api(scope=READ, subject=Sandbox)
def get_host(request: ApiRequest, sandbox_id: str) -> Steps[HttpResponse]:
    """``GET …/host?port=``: the host name of a preview."""
    port = request.GET.get("port")
    host = yield from services.get_preview_host.steps(request.actor, sandbox_id, port)
    return json_response({"host": host})


@api(scope=READ, subject=Sandbox)
def list_egress(request: ApiRequest, sandbox_id: str) -> HttpResponse:
    """``GET …/egress``: hosts, counts and bytes; an extension of the public API."""
    return json_response(presenters.egress_hosts(services.list_egress(request.actor, sandbox_id)))


@api(scope=READ)
def get_template_use(request: ApiRequest, template_id: str) -> HttpResponse:
    """``GET /v1/templates/{id}/usage``: what uses it; an extension of the public API."""
    use = services.template_use(request.actor, template_id)
    return json_response(presenters.template_use_detail(use))


@api(scope=WRITE, subject=Sandbox)
def create_snapshot(request: ApiRequest, sandbox_id: str) -> Steps[HttpResponse]:
    """``POST /v1/sandboxes/{id}/snapshots``: answers once sandboxes can start from it."""
    spec = read_json(request, SnapshotSpec)
    snapshot = yield from services.create_snapshot.steps(request.actor, sandbox_id, spec)
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
def delete_snapshot(request: ApiRequest, snapshot_id: str) -> Steps[HttpResponse]:
    """``DELETE /v1/sandboxes/snapshots/{id}``: idempotent."""
    yield from services.delete_snapshot.steps(request.actor, snapshot_id)
    return no_content()
