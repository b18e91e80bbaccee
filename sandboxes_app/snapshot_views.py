"""The console's pages about snapshots."""

from __future__ import annotations

from django.contrib import messages
from django.http import HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_http_methods, require_POST, require_safe

from orkestr_console.accounts.limits import envelope
from orkestr_console.core.errors import DomainError, NotFound
from orkestr_console.http.decorators import ConsoleRequest, console_page
from sandboxes_app import services
from sandboxes_app.forms import ForkForm, SnapshotForm, lifetimes
from sandboxes_app.models import Snapshot

PAGE = 50


@require_safe
@console_page
def snapshots_page(request: ConsoleRequest) -> HttpResponse:
    """The team's snapshots; for a script the first ones alone, to follow what is being taken."""
    cursor, team = request.GET.get("cursor") or None, request.actor.team
    snapshots, next_cursor = services.list_snapshots(request.actor, limit=PAGE, cursor=cursor)
    allowed = envelope(team)
    context = {
        "snapshots": snapshots,
        "next_cursor": next_cursor,
        "cursor": cursor,
        "capturing": cursor is None and any(one.is_capturing for one in snapshots),
        "used": services.snapshot_counts([team])[team.pk],
        "allowed_count": allowed.value("max_named_snapshots"),
        "allowed_mb": allowed.value("snapshot_disk_mb"),
    }
    name = "snapshots.html#list" if request.htmx else "snapshots.html"
    return render(request, f"sandboxes_app/{name}", context)


@require_safe
@console_page
def snapshot_detail(request: ConsoleRequest, snapshot_id: str) -> HttpResponse:
    """One snapshot, with a form to start a sandbox from it; a script follows how it is taken."""
    snapshot = services.get_snapshot(request.actor, snapshot_id)
    return detail_page(request, snapshot, ForkForm(network=snapshot.network))


def detail_page(
    request: ConsoleRequest, snapshot: Snapshot, form: ForkForm, status: int = 200
) -> HttpResponse:
    """The page of one snapshot, with the form as it was filled in."""
    allowed = envelope(request.actor.team, request.actor.user)
    context = {
        "snapshot": snapshot,
        "form": form,
        "allowed": allowed,
        "lifetimes": lifetimes(allowed, form.timeout_seconds),
        "volumes": services.list_volumes(request.actor),
    }
    name = "snapshot.html#snapshot" if request.htmx else "snapshot.html"
    return render(request, f"sandboxes_app/{name}", context, status=status)


# A refused form repeats the variables typed, which may be secrets.
@never_cache
@require_POST
@console_page
def snapshot_start(request: ConsoleRequest, snapshot_id: str) -> HttpResponse:
    """Start a sandbox from it, and show that. A refused form keeps what was chosen."""
    form = ForkForm.from_post(request.POST)
    form.snapshot = services.get_snapshot(request.actor, snapshot_id).pk
    try:
        sandbox = services.create_sandbox(request.actor, form.spec())
    except DomainError as error:
        form.add_error(error)
        # As it is now: the host may have lost it.
        snapshot = services.get_snapshot(request.actor, snapshot_id)
        return detail_page(request, snapshot, form, error.status)
    return redirect("sandboxes:detail", sandbox.pk)


@require_http_methods(["GET", "HEAD", "POST"])
@console_page
def snapshot_new(request: ConsoleRequest, sandbox_id: str) -> HttpResponse:
    """Ask for a name, then take one of a sandbox. The page is the dialog without a script."""
    sandbox = services.get_sandbox(request.actor, sandbox_id)
    form, status = SnapshotForm.from_post(request.POST), 200
    if request.method == "POST":
        try:
            snapshot = services.create_snapshot(request.actor, sandbox_id, form.spec())
        except NotFound:
            raise
        except DomainError as error:
            form.add_error(error)
            status = error.status
        else:
            messages.success(request, "The snapshot was taken.")
            return redirect("sandboxes:snapshot", snapshot.pk)
    context = {"sandbox": sandbox, "form": form}
    return render(request, "sandboxes_app/snapshot_new.html", context, status=status)


@require_http_methods(["GET", "HEAD", "POST"])
@console_page
def snapshot_delete(request: ConsoleRequest, snapshot_id: str) -> HttpResponse:
    """Say what goes, then delete it."""
    snapshot = services.get_snapshot(request.actor, snapshot_id)
    if request.method != "POST":
        return render(request, "sandboxes_app/snapshot_delete.html", {"snapshot": snapshot})
    services.delete_snapshot(request.actor, snapshot_id)
    messages.success(request, f"The snapshot {snapshot.title} was deleted.")
    return redirect("sandboxes:snapshots")
