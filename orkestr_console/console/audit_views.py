"""The audit log page for a team's admins, and its exports."""

from __future__ import annotations

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
from orkestr_console.core.errors import InvalidInput
from orkestr_console.http.decorators import ConsoleRequest, console_page
from orkestr_console.http.validation import parse_spec
from orkestr_console.ui.downloads import csv_file, json_lines_file

COLUMNS = (
    *("at", "who", "token", "surface", "address", "action", "outcome", "code", "detail"),
    *("object_kind", "object_id", "object_name", "data"),
)
SURFACES = ("console", "rest", "mcp", "system")
MAX_ID = 2**63 - 1
MAX_ID_DIGITS = 19  # digits


def typed_filters(request: ConsoleRequest) -> dict[str, str]:
    """The filters as typed."""
    return {name: request.GET.get(name, "").strip() for name in AuditQuery.model_fields}


def parse_query(values: Mapping[str, str]) -> AuditQuery:
    """The validated filter. Raises ``InvalidInput``."""
    return parse_spec(AuditQuery, {name: value for name, value in values.items() if value})


@require_safe
@console_page
def audit_page(request: ConsoleRequest) -> HttpResponse:
    """The newest matching entries; invalid filters are reported, not ignored."""
    actor, values = request.actor, typed_filters(request)
    context: dict[str, Any] = {"typed": values, "surfaces": SURFACES, "outcomes": Outcome}
    context["actions"] = audit_log.actions(actor)
    status = 200
    try:
        before = parse_before(request.GET.get("before", ""))
        context["entries"], next_before = audit_log.page(actor, parse_query(values), before)
    except InvalidInput as error:
        context["error"], status = error.detail, error.status
    else:
        filters = {name: value for name, value in values.items() if value}
        context["query"] = urlencode(filters)
        context["older"] = urlencode({**filters, "before": next_before}) if next_before else ""
        context["paged"] = before is not None
    return render(request, "console/audit.html", context, status=status)


def parse_before(text: str) -> int | None:
    """The entry that the page ends before, or None. Raises ``InvalidInput``."""
    if not text:
        return None
    is_number = text.isascii() and text.isdigit() and len(text) <= MAX_ID_DIGITS
    if not is_number or int(text) > MAX_ID:
        raise InvalidInput("before: is not an entry of the log; start from the newest.")
    return int(text)


@require_safe
@console_page
def audit_csv(request: ConsoleRequest) -> HttpResponse:
    """The matching entries as CSV."""
    entries = audit_log.export_entries(request.actor, parse_query(typed_filters(request)))
    rows = (text_cells(entry_record(entry)) for entry in entries)
    return csv_file(f"audit-{request.actor.team.slug}.csv", COLUMNS, rows)


@require_safe
@console_page
def audit_json(request: ConsoleRequest) -> HttpResponse:
    """The matching entries as JSON lines."""
    entries = audit_log.export_entries(request.actor, parse_query(typed_filters(request)))
    return json_lines_file(f"audit-{request.actor.team.slug}.jsonl", map(entry_record, entries))


def entry_record(entry: AuditEntry) -> dict[str, Any]:
    """An entry by column."""
    return {**{name: getattr(entry, name) for name in COLUMNS}, "at": entry.at.isoformat()}


def text_cells(values: Mapping[str, Any]) -> list[str]:
    """A record's values as text; other types as JSON."""
    return [v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values.values()]
