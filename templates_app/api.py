"""Templates over REST."""

from __future__ import annotations

from django.http import HttpResponse

from orkestr_console.accounts.actor import READ, WRITE
from orkestr_console.decorators import ApiRequest, api
from orkestr_console.json_api import json_answer, no_content, read_json
from orkestr_console.services.paging import read_limit
from templates_app import presenters, services
from templates_app.specs import TemplateSpec

LARGEST_RECIPE = 6 * 1024 * 1024


@api(scope=WRITE)
def create_template(request: ApiRequest) -> HttpResponse:
    """``POST /v1/templates``: answers at once, the build goes on."""
    # 100 steps of 8 KiB, and what JSON may make of each character.
    spec = read_json(request, TemplateSpec, largest=LARGEST_RECIPE)
    template = services.create_template(request.actor, spec)
    return json_answer(
        presenters.template_detail(template, services.list_steps(template)), status=201
    )


@api(scope=READ)
def list_templates(request: ApiRequest) -> HttpResponse:
    """``GET /v1/templates``: the team's, newest first."""
    rows, cursor = services.list_templates(
        request.actor,
        limit=read_limit(request.GET.get("limit")),
        cursor=request.GET.get("cursor"),
    )
    listed = [presenters.template_summary(row) for row in rows]
    return json_answer({"templates": listed, "next_cursor": cursor})


@api(scope=READ)
def get_template(request: ApiRequest, template_id: str) -> HttpResponse:
    """``GET /v1/templates/{id}``."""
    template = services.get_template(request.actor, template_id)
    return json_answer(presenters.template_detail(template, services.list_steps(template)))


@api(scope=WRITE)
def delete_template(request: ApiRequest, template_id: str) -> HttpResponse:
    """``DELETE /v1/templates/{id}``."""
    services.delete_template(request.actor, template_id)
    return no_content()
