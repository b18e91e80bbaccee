"""Snapshots of sandboxes over REST."""

from __future__ import annotations

from django.http import HttpResponse

from orkestr_console.accounts.actor import READ, WRITE
from orkestr_console.http.decorators import ApiRequest, api
from orkestr_console.http.json_api import json_answer, no_content, read_json
from orkestr_console.http.paging import read_limit
from sandboxes_app import presenters, services
from sandboxes_app.specs import SnapshotSpec


@api(scope=WRITE)
def create_snapshot(request: ApiRequest, sandbox_id: str) -> HttpResponse:
    """``POST /v1/sandboxes/{id}/snapshots``: answers when it can be started from."""
    spec = read_json(request, SnapshotSpec)
    snapshot = services.create_snapshot(request.actor, sandbox_id, spec)
    return json_answer(presenters.snapshot_detail(snapshot), status=201)


@api(scope=READ)
def list_snapshots(request: ApiRequest) -> HttpResponse:
    """``GET /v1/sandboxes/snapshots``."""
    rows, cursor = services.list_snapshots(
        request.actor,
        limit=read_limit(request.GET.get("limit")),
        cursor=request.GET.get("cursor"),
    )
    listed = [presenters.snapshot_detail(row) for row in rows]
    return json_answer({"snapshots": listed, "next_cursor": cursor})


@api(scope=READ)
def get_snapshot(request: ApiRequest, snapshot_id: str) -> HttpResponse:
    """``GET /v1/sandboxes/snapshots/{id}``."""
    snapshot = services.get_snapshot(request.actor, snapshot_id)
    return json_answer(presenters.snapshot_detail(snapshot))


@api(scope=WRITE)
def delete_snapshot(request: ApiRequest, snapshot_id: str) -> HttpResponse:
    """``DELETE /v1/sandboxes/snapshots/{id}``: idempotent."""
    services.delete_snapshot(request.actor, snapshot_id)
    return no_content()
