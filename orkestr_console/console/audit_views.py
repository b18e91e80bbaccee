"""The page of the audit log, for a team's admins, and its export."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from django.http import HttpResponse
from django.shortcuts import render
from django.views.decorators.http import require_safe

from orkestr_console.accounts import audit_log
from orkestr_console.accounts.audit_log import AuditQuery
from orkestr_console.accounts.models import AuditEntry, Outcome
from orkestr_console.decorators import ConsoleRequest, console_page
from orkestr_console.errors import InvalidInput
from orkestr_console.validation import parse_spec

COLUMNS = (
    *("at", "who", "token", "surface", "address", "action", "outcome", "code", "detail"),
    *("object_kind", "object_id", "object_name", "data"),
)
SURFACES = ("console", "rest", "mcp", "system")
# A spreadsheet takes a cell that begins with one of these for a formula.
FORMULA = ("=", "+", "-", "@", "\t", "\r")
LARGEST_ID = 2**63 - 1


def typed(request: ConsoleRequest) -> dict[str, str]:
    """The filters as typed."""
    return {name: request.GET.get(name, "").strip() for name in AuditQuery.model_fields}


def asked(values: Mapping[str, str]) -> AuditQuery:
    """What is asked for. Raises ``InvalidInput``."""
    return parse_spec(AuditQuery, {name: value for name, value in values.items() if value})


@require_safe
@console_page
def audit_page(request: ConsoleRequest) -> HttpResponse:
    """The newest entries that match; filters that cannot be read are said, not ignored."""
    actor, values = request.actor, typed(request)
    context: dict[str, Any] = {"typed": values, "surfaces": SURFACES, "outcomes": Outcome}
    context["actions"] = audit_log.actions(actor)
    status = 200
    try:
        before = before_of(request.GET.get("before", ""))
        context["entries"], following = audit_log.page(actor, asked(values), before)
    except InvalidInput as error:
        context["error"], status = error.detail, error.status
    else:
        given = {name: value for name, value in values.items() if value}
        context["query"] = urlencode(given)
        context["older"] = urlencode({**given, "before": following}) if following else ""
        context["paged"] = before is not None
    return render(request, "console/audit.html", context, status=status)


def before_of(text: str) -> int | None:
    """Where a page begins. Raises ``InvalidInput``."""
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and int(text[:20]) <= LARGEST_ID):
        raise InvalidInput("before: is no entry of the log; start from the newest.")
    return int(text)


@require_safe
@console_page
def audit_csv(request: ConsoleRequest) -> HttpResponse:
    """The entries that match, as a table."""
    response = download("text/csv; charset=utf-8", "csv", request)
    rows = csv.writer(response)
    rows.writerow(COLUMNS)
    for entry in audit_log.exported(request.actor, asked(typed(request))):
        rows.writerow([cell(value) for value in record(entry).values()])
    return response


@require_safe
@console_page
def audit_json(request: ConsoleRequest) -> HttpResponse:
    """The entries that match, as an object a line."""
    response = download("application/x-ndjson", "jsonl", request)
    for entry in audit_log.exported(request.actor, asked(typed(request))):
        response.write(json.dumps(record(entry), ensure_ascii=False) + "\n")
    return response


def download(content_type: str, suffix: str, request: ConsoleRequest) -> HttpResponse:
    """An empty file to be saved."""
    response = HttpResponse(content_type=content_type)
    name = f"audit-{request.actor.team.slug}.{suffix}"
    response.headers["Content-Disposition"] = f'attachment; filename="{name}"'
    return response


def record(entry: AuditEntry) -> dict[str, Any]:
    """An entry by column."""
    return {**{name: getattr(entry, name) for name in COLUMNS}, "at": entry.at.isoformat()}


def cell(value: Any) -> str:
    """A value that no spreadsheet computes."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"'{text}" if text.startswith(FORMULA) else text
