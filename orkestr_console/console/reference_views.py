"""The API's reference: what :mod:`orkestr_console.openapi` says, to be read by people."""

from __future__ import annotations

from django.http import HttpResponse
from django.shortcuts import render
from django.views.decorators.http import require_safe

from orkestr_console.core.addresses import console_address
from orkestr_console.core.errors import NotFound
from orkestr_console.http.decorators import ConsoleRequest, console_page
from orkestr_console.openapi.shown import groups


@require_safe
@console_page
def reference_page(request: ConsoleRequest) -> HttpResponse:
    """All calls, each a line."""
    context = {"groups": groups(), "address": console_address(request)}
    return render(request, "console/reference.html", context)


@require_safe
@console_page
def reference_group(request: ConsoleRequest, group: str) -> HttpResponse:
    """The calls of one group. Raises ``NotFound``."""
    shown = next((each for each in groups() if each.slug == group), None)
    if shown is None:
        raise NotFound("The reference has no such page; find the call in its list.")
    context = {"group": shown, "groups": groups()}
    return render(request, "console/reference_group.html", context)
