"""The part of a sandbox's page that leads to its previews."""

from __future__ import annotations

from django.http import HttpResponse
from django.shortcuts import render
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_safe

from orkestr_console.core.errors import DomainError
from orkestr_console.http.decorators import ConsoleRequest, console_page
from sandboxes_app import services


# The address has the token in it.
@never_cache
@require_safe
@console_page
def sandbox_preview(request: ConsoleRequest, sandbox_id: str) -> HttpResponse:
    """The address of a port: a fragment for the script, or a page of its own without one."""
    port = request.GET.get("port") or ""
    sandbox = services.get_sandbox(request.actor, sandbox_id)
    context: dict[str, object] = {"port": port, "sandbox": sandbox}
    if port:
        try:
            host = services.get_preview_host(request.actor, sandbox_id, port)
            context["address"] = services.preview_address(sandbox, host)
            token = services.shown_token(request.actor, sandbox)
            context["link"] = services.preview_address(sandbox, host, token)
        except DomainError as error:
            context["error"] = error.detail
    name = "_preview" if request.htmx else "preview"
    return render(request, f"sandboxes_app/{name}.html", context)
