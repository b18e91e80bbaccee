"""Sandboxes and their snapshots over REST."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from time import monotonic
from typing import Any

from django.http import HttpRequest, HttpResponse, HttpResponseBase

from orkestr_console.accounts.actor import READ, WRITE
from orkestr_console.core.errors import (
    Conflict,
    DomainError,
    ExecKilled,
    ExecTimeout,
    HostUnavailable,
    InvalidInput,
    NotFound,
)
from orkestr_console.core.hosts import Steps
from orkestr_console.http.decorators import ApiRequest, api, revalidate
from orkestr_console.http.describing import EVENTS, PAGING, Parameter, describe, number
from orkestr_console.http.json_api import json_response, no_content, read_json, timestamp
from orkestr_console.http.paging import read_limit
from orkestr_console.http.steps import to_its_end
from orkestr_console.http.streams import OwningStream
from orkestr_console.http.threads import in_thread
from sandboxes_app import presenters, services
from sandboxes_app.answers import (
    EgressHostList,
    ExecResult,
    Expiry,
    LimitsDetail,
    MetricsDetail,
    PausedSandbox,
    PreviewHost,
    SandboxDetail,
    SandboxList,
    SnapshotDetail,
    SnapshotList,
    StreamEvent,
    TemplateUseDetail,
)
from sandboxes_app.models import Sandbox, SandboxStatus
from sandboxes_app.specs import (
    ExecSpec,
    SandboxSpec,
    SnapshotSpec,
    TimeoutSpec,
)

STATUS = Parameter(
    "status", {"type": "string", "enum": SandboxStatus.values}, "Only those of this status."
)
METADATA = Parameter(
    "metadata[]",
    {"type": "object", "additionalProperties": {"type": "string"}},
    "Only those with these labels, as `metadata[key]=value`.",
)
SINCE = Parameter(
    "since",
    {"type": "integer", "minimum": 0, "maximum": services.MAX_UNIX_TIME},
    "Only samples after this Unix time, in whole seconds.",
)
PORT = Parameter("port", number(1, 65_535), "The port inside.", required=True)
# Well under the 30 s after which the official SDK gives up on a silent connection.
KEEP_ALIVE_SECONDS = 10.0
KEEP_ALIVE = b": the command still runs\n\n"


@describe(
    "Create a sandbox",
    notes="Answers once it is running.",
    body=SandboxSpec,
    example={"template": "python-3.12", "timeout_seconds": 600},
    answer=SandboxDetail,
    status=201,
    errors=(Conflict, NotFound),
)
@api(scope=WRITE)
def create_sandbox(request: ApiRequest) -> Steps[HttpResponse]:
    """``POST /v1/sandboxes``: answers once it is running."""
    spec = read_json(request, SandboxSpec)
    sandbox = yield from services.create_sandbox.steps(request.actor, spec)
    return json_response(presenters.sandbox_detail(sandbox, request.actor), status=201)


@describe("List sandboxes", parameters=(STATUS, METADATA, *PAGING), answer=SandboxList)
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
    listed = [presenters.sandbox_detail(row, request.actor) for row in rows]
    return json_response(SandboxList(sandboxes=listed, next_cursor=cursor))


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


@describe("Show the plan's limits", answer=LimitsDetail)
@api(scope=READ)
def get_limits(request: ApiRequest) -> HttpResponse:
    """``GET /v1/sandboxes/limits``."""
    return json_response(presenters.limits_detail(services.limits(request.actor)))


@describe("Show a sandbox", answer=SandboxDetail)
@api(scope=READ, subject=Sandbox)
def get_sandbox(request: ApiRequest, sandbox_id: str) -> HttpResponse:
    """``GET /v1/sandboxes/{id}``."""
    sandbox = services.get_sandbox(request.actor, sandbox_id)
    return json_response(presenters.sandbox_detail(sandbox, request.actor))


@describe(
    "Terminate a sandbox",
    notes="Once more is no error; it stays in the list.",
    status=204,
    errors=(Conflict,),
)
@api(scope=WRITE, subject=Sandbox)
def terminate_sandbox(request: ApiRequest, sandbox_id: str) -> Steps[HttpResponse]:
    """``DELETE /v1/sandboxes/{id}``: idempotent; the row stays in history."""
    yield from services.terminate_sandbox.steps(request.actor, sandbox_id)
    return no_content()


@describe(
    "Set a sandbox's lifetime",
    notes="From now on.",
    body=TimeoutSpec,
    example={"timeout_seconds": 1800},
    answer=Expiry,
    errors=(Conflict,),
)
@api(scope=WRITE, subject=Sandbox)
def set_timeout(request: ApiRequest, sandbox_id: str) -> Steps[HttpResponse]:
    """``POST …/timeout``: a new lifetime, from now."""
    spec = read_json(request, TimeoutSpec)
    sandbox = yield from services.set_timeout.steps(request.actor, sandbox_id, spec)
    return json_response(Expiry(expires_at=timestamp(sandbox.expires_at)))


@describe(
    "Pause a sandbox",
    notes="Answers once it is paused. Files and memory are kept.",
    answer=PausedSandbox,
    errors=(Conflict,),
)
@api(scope=WRITE, subject=Sandbox)
def pause_sandbox(request: ApiRequest, sandbox_id: str) -> Steps[HttpResponse]:
    """``POST …/pause``: answers once it is paused."""
    sandbox = yield from services.pause_sandbox.steps(request.actor, sandbox_id)
    return json_response(PausedSandbox(sandbox_id=sandbox.pk))


@describe(
    "Resume a sandbox",
    notes="Answers once it is running again.",
    answer=SandboxDetail,
    errors=(Conflict,),
)
@api(scope=WRITE, subject=Sandbox)
def resume_sandbox(request: ApiRequest, sandbox_id: str) -> Steps[HttpResponse]:
    """``POST …/resume``: answers once it is running again."""
    sandbox = yield from services.resume_sandbox.steps(request.actor, sandbox_id)
    return json_response(presenters.sandbox_detail(sandbox, request.actor))


def begin_command(
    request: ApiRequest, sandbox_id: str
) -> services.Command | services.CommandStream:
    """What runs in a thread before a command does: it is read, and allowed."""
    spec = read_json(request, ExecSpec)
    if spec.stream:
        return services.exec_stream(request.actor, sandbox_id, spec)
    return services.prepare_command(request.actor, sandbox_id, spec)


@describe(
    "Run a command",
    notes="Answers when it ends, or with `stream: true` as events while it runs. If the client "
    "leaves, it is killed.",
    body=ExecSpec,
    example={"command": "python3 -c 'print(6 * 7)'"},
    answer=ExecResult,
    also={EVENTS: StreamEvent},
    errors=(Conflict, ExecTimeout, ExecKilled),
)
@api(scope=WRITE, first=begin_command, subject=Sandbox)
async def exec_command(
    request: ApiRequest, command: services.Command | services.CommandStream
) -> HttpResponseBase:
    """``POST …/exec``: buffered, or as server-sent events with ``stream: true``."""
    if isinstance(command, services.CommandStream):
        return await streaming_response(request, command)
    outcome = await services.run_command(command)
    return await to_its_end(in_thread(command_answer, command, outcome))


def command_answer(command: services.Command, outcome: services.Outcome) -> HttpResponse:
    """What runs in a thread after a command, also if the client leaves meanwhile.

    It is recorded, and its output encoded.
    """
    return json_response(presenters.exec_answer(services.conclude_command(command, outcome)))


async def streaming_response(request: HttpRequest, frames: services.CommandStream) -> OwningStream:
    """Start the stream once its first frame arrives: until then, an error is a normal response."""
    first = await anext(frames, None)
    if first is None:
        # The host said nothing at all, and its connection has ended.
        raise HostUnavailable
    return sent_as_events(request, first, frames, WRITE)


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
                        yield encode_event(frames.error_frame(error.code, error.detail))
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


@describe("Show what a sandbox uses", parameters=(SINCE,), answer=MetricsDetail)
@api(scope=READ, subject=Sandbox)
def get_metrics(request: ApiRequest, sandbox_id: str) -> Steps[HttpResponse]:
    """``GET …/metrics?since=``: null figures unless it is running."""
    since = request.GET.get("since")
    metrics = yield from services.get_metrics.steps(request.actor, sandbox_id, since)
    return json_response(presenters.metrics_detail(metrics))


@describe(
    "Show the host name of a preview", parameters=(PORT,), answer=PreviewHost, errors=(Conflict,)
)
@api(scope=READ, subject=Sandbox)
def get_host(request: ApiRequest, sandbox_id: str) -> Steps[HttpResponse]:
    """``GET …/host?port=``: the host name of a preview."""
    port = request.GET.get("port")
    host = yield from services.get_preview_host.steps(request.actor, sandbox_id, port)
    return json_response(PreviewHost(host=host))


@describe("List the hosts a sandbox made requests to", answer=EgressHostList, extension=True)
@api(scope=READ, subject=Sandbox)
def list_egress(request: ApiRequest, sandbox_id: str) -> HttpResponse:
    """``GET …/egress``: hosts, counts and bytes; an extension of the public API."""
    return json_response(presenters.egress_hosts(services.list_egress(request.actor, sandbox_id)))


@describe("Show what uses a template", answer=TemplateUseDetail, extension=True)
@api(scope=READ)
def get_template_use(request: ApiRequest, template_id: str) -> HttpResponse:
    """``GET /v1/templates/{id}/usage``: what uses it; an extension of the public API."""
    use = services.template_use(request.actor, template_id)
    return json_response(presenters.template_use_detail(use))


@describe(
    "Take a snapshot",
    notes="Of the files. Answers once sandboxes can start from it; the sandbox goes on.",
    body=SnapshotSpec,
    example={"name": "with-data"},
    answer=SnapshotDetail,
    status=201,
    errors=(Conflict,),
)
@api(scope=WRITE, subject=Sandbox)
def create_snapshot(request: ApiRequest, sandbox_id: str) -> Steps[HttpResponse]:
    """``POST /v1/sandboxes/{id}/snapshots``: answers once sandboxes can start from it."""
    spec = read_json(request, SnapshotSpec)
    snapshot = yield from services.create_snapshot.steps(request.actor, sandbox_id, spec)
    return json_response(presenters.snapshot_detail(snapshot), status=201)


@describe("List snapshots", parameters=PAGING, answer=SnapshotList)
@api(scope=READ)
def list_snapshots(request: ApiRequest) -> HttpResponse:
    """``GET /v1/sandboxes/snapshots``."""
    rows, cursor = services.list_snapshots(
        request.actor,
        limit=read_limit(request.GET.get("limit")),
        cursor=request.GET.get("cursor"),
    )
    listed = [presenters.snapshot_detail(row) for row in rows]
    return json_response(SnapshotList(snapshots=listed, next_cursor=cursor))


@describe("Show a snapshot", answer=SnapshotDetail)
@api(scope=READ)
def get_snapshot(request: ApiRequest, snapshot_id: str) -> HttpResponse:
    """``GET /v1/sandboxes/snapshots/{id}``."""
    snapshot = services.get_snapshot(request.actor, snapshot_id)
    return json_response(presenters.snapshot_detail(snapshot))


@describe("Delete a snapshot", notes="Once more is no error.", status=204, errors=(Conflict,))
@api(scope=WRITE)
def delete_snapshot(request: ApiRequest, snapshot_id: str) -> Steps[HttpResponse]:
    """``DELETE /v1/sandboxes/snapshots/{id}``: idempotent."""
    yield from services.delete_snapshot.steps(request.actor, snapshot_id)
    return no_content()
