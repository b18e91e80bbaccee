"""Volumes under ``/v1/sandboxes/volumes``."""

from __future__ import annotations

from django.http import HttpResponse

from orkestr_console.accounts.actor import READ, WRITE
from orkestr_console.core.errors import Conflict, PlanLimit
from orkestr_console.core.hosts import Steps
from orkestr_console.http.decorators import ApiRequest, api
from orkestr_console.http.describing import describe
from orkestr_console.http.json_api import json_response, no_content, read_json
from sandboxes_app import services
from sandboxes_app.answers import VolumeDetail, VolumeList
from sandboxes_app.presenters import volume_detail
from sandboxes_app.specs import LifetimeSpec, RegionSpec, VolumeSpec


@describe(
    "Create a volume",
    body=VolumeSpec,
    example={"name": "data", "size_gb": 10},
    answer=VolumeDetail,
    status=201,
    errors=(Conflict, PlanLimit),
)
@api(scope=WRITE)
def create_volume(request: ApiRequest) -> HttpResponse:
    """``POST /v1/sandboxes/volumes``."""
    spec = read_json(request, VolumeSpec)
    return json_response(volume_detail(services.create_volume(request.actor, spec)), status=201)


@describe("List volumes", answer=VolumeList)
@api(scope=READ)
def list_volumes(request: ApiRequest) -> HttpResponse:
    """``GET /v1/sandboxes/volumes``: whole, as clients follow no cursor."""
    listed = [volume_detail(volume) for volume in services.list_volumes(request.actor)]
    return json_response(VolumeList(volumes=listed))


@describe("Show a volume", answer=VolumeDetail)
@api(scope=READ)
def get_volume(request: ApiRequest, volume_id: str) -> HttpResponse:
    """``GET /v1/sandboxes/volumes/{id}``."""
    return json_response(volume_detail(services.get_volume(request.actor, volume_id)))


@describe(
    "Change a volume's lifetime",
    body=LifetimeSpec,
    example={"max_lifetime_days": 30},
    answer=VolumeDetail,
    errors=(Conflict,),
)
@api(scope=WRITE)
def update_volume(request: ApiRequest, volume_id: str) -> HttpResponse:
    """``PATCH /v1/sandboxes/volumes/{id}``: its lifetime."""
    spec = read_json(request, LifetimeSpec)
    return json_response(volume_detail(services.update_volume(request.actor, volume_id, spec)))


@describe(
    "Move a volume to another region",
    notes="This server has one region, so a volume only stays where it is.",
    body=RegionSpec,
    example={"region": "local"},
    answer=VolumeDetail,
    errors=(Conflict,),
)
@api(scope=WRITE)
def move_volume(request: ApiRequest, volume_id: str) -> HttpResponse:
    """``POST /v1/sandboxes/volumes/{id}/move``."""
    spec = read_json(request, RegionSpec)
    return json_response(volume_detail(services.move_volume(request.actor, volume_id, spec)))


@describe(
    "Delete a volume",
    notes="With all that is on it. Once more is no error.",
    status=204,
    errors=(Conflict,),
)
@api(scope=WRITE)
def delete_volume(request: ApiRequest, volume_id: str) -> Steps[HttpResponse]:
    """``DELETE /v1/sandboxes/volumes/{id}``: idempotent."""
    yield from services.delete_volume.steps(request.actor, volume_id)
    return no_content()
