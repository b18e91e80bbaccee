"""The console's pages about volumes."""

from __future__ import annotations

from django.contrib import messages
from django.http import HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_http_methods, require_safe

from orkestr_console.accounts.limits import envelope
from orkestr_console.core.errors import Conflict
from orkestr_console.http.decorators import ConsoleRequest, console_page
from sandboxes_app import services


@require_safe
@console_page
def volumes_page(request: ConsoleRequest) -> HttpResponse:
    """The team's volumes."""
    volumes = services.list_volumes(request.actor)
    context = {
        "volumes": volumes,
        "total_mb": sum(volume.size_mb for volume in volumes),
        "allowed_mb": envelope(request.actor.team).value("volume_disk_mb"),
    }
    return render(request, "sandboxes_app/volumes.html", context)


@require_http_methods(["GET", "HEAD", "POST"])
@console_page
def volume_delete(request: ConsoleRequest, volume_id: str) -> HttpResponse:
    """Say what goes, then delete it."""
    context: dict[str, object] = {"volume": services.get_volume(request.actor, volume_id)}
    if request.method != "POST":
        return render(request, "sandboxes_app/volume_delete.html", context)
    try:
        services.delete_volume(request.actor, volume_id)
    except Conflict as error:
        context["refused"] = error
        return render(request, "sandboxes_app/volume_delete.html", context, status=error.status)
    messages.success(request, "The volume was deleted, with all files on it.")
    return redirect("sandboxes:volumes")
