"""The quarantine: what the host kept instead of deleting, for an operator to restore or delete."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from django.contrib import messages
from django.http import HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_http_methods, require_POST, require_safe

from orkestr_console.console.operator_views import request_operator
from orkestr_console.core.errors import DomainError
from orkestr_console.http.decorators import ConsoleRequest, console_page
from orkestr_console.installation import services

PAGE = "console:operator_storage"


@never_cache
@require_safe
@console_page
def storage_page(request: ConsoleRequest) -> HttpResponse:
    """Whether database and state directory belong together, and what is in quarantine."""
    request_operator(request)
    context: dict[str, Any] = {"installation": services.current()}
    try:
        items = services.list_quarantine()
    except DomainError as error:
        context["error"] = error.detail
    else:
        context["things"] = [(one, datetime.fromtimestamp(one.at, UTC)) for one in items]
    return render(request, "console/operator_storage.html", context)


@require_POST
@console_page
def storage_restore(request: ConsoleRequest, key: str) -> HttpResponse:
    """Restore an item."""
    operator = request_operator(request)
    try:
        item = services.restore(key, operator)
    except DomainError as error:
        messages.error(request, error.detail)
    else:
        messages.success(request, f"The {item.kind} {item.name} was put back.")
    return redirect(PAGE)


@require_http_methods(["GET", "HEAD", "POST"])
@console_page
def storage_delete(request: ConsoleRequest, key: str) -> HttpResponse:
    """Delete an item permanently, after confirmation."""
    operator = request_operator(request)
    if request.method != "POST":
        context = {"key": key, "heading": "Delete it permanently?", "action": "Delete permanently"}
        return render(request, "console/operator_storage_sure.html", context)
    try:
        services.delete(key, operator)
    except DomainError as error:
        messages.error(request, error.detail)
    else:
        messages.success(request, f"{key} was deleted.")
    return redirect(PAGE)


@require_http_methods(["GET", "HEAD", "POST"])
@console_page
def storage_accept(request: ConsoleRequest) -> HttpResponse:
    """Confirm that database and state directory belong together."""
    operator = request_operator(request)
    if request.method != "POST":
        context = {
            "installation": services.current(),
            "heading": "Do they belong together?",
            "action": "They belong together",
        }
        return render(request, "console/operator_storage_sure.html", context)
    try:
        services.adopt(operator)
    except DomainError as error:
        messages.error(request, error.detail)
    else:
        messages.success(request, "Database and state directory belong together from now on.")
    return redirect(PAGE)
