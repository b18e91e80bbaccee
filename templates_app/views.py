"""The console's pages about templates."""

from __future__ import annotations

import re
from typing import Literal

from django.contrib import messages
from django.http import HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_http_methods, require_POST, require_safe

from orkestr_console.accounts.limits import envelope
from orkestr_console.core.addresses import console_address
from orkestr_console.core.errors import Conflict, DomainError, NotFound
from orkestr_console.http.decorators import ConsoleRequest, console_page
from templates_app import pages, services
from templates_app.forms import PRESETS, TemplateForm
from templates_app.models import Template
from templates_app.services import again
from templates_app.specs import MAX_DISK_MB, MAX_STEPS, MIN_DISK_MB

_LINE = re.compile(r"(\d{1,4})-(\d{1,9})", re.ASCII)


@require_safe
@console_page
def template_list(request: ConsoleRequest) -> HttpResponse:
    """The team's templates, and how many more the plan allows."""
    cursor = request.GET.get("cursor") or None
    context = {**pages.list_context(request.actor, cursor), "cursor": cursor}
    return render(request, "templates_app/list.html", context)


@require_http_methods(["GET", "HEAD", "POST"])
@console_page
def template_new(request: ConsoleRequest) -> HttpResponse:
    """Show the form, or create a template from it. A refused form keeps what was typed."""
    if request.method != "POST":
        return form_page(request, prefilled(request))
    form = TemplateForm.from_post(request.POST)
    try:
        template = services.create_template(request.actor, form.spec())
    except DomainError as error:
        form.add_error(error)
        return form_page(request, form, error.status)
    return redirect("templates:detail", template.pk)


def prefilled(request: ConsoleRequest) -> TemplateForm:
    """A form prefilled from ``?from=``, ``?preset=`` or ``?base=``."""
    if source := request.GET.get("from"):
        form = TemplateForm.from_template(services.get_template(request.actor, source))
        form.allow_domains = f"{form.allow_domains} {request.GET.get('allow', '')}".strip()
        form.network = "open" if request.GET.get("network") == "open" else form.network
        form.reuse = "failed" if request.GET.get("reuse") == "failed" else ""
        return form
    form = TemplateForm.from_preset(request.GET.get("preset", ""))
    form.base_template = request.GET.get("base") or form.base_template
    return form


def form_page(request: ConsoleRequest, form: TemplateForm, status: int = 200) -> HttpResponse:
    """The page with the form."""
    bases = services.list_bases(request.actor)
    allowed = envelope(request.actor.team, request.actor.user)
    context = {
        "form": form,
        "built_in": [base for base in bases if base.group == "builtin"],
        "own": [base for base in bases if base.group == "team"],
        "known": {base.id for base in bases},
        "usage": services.template_usage(request.actor),
        "allowed": allowed,
        "longest_step": allowed.value("step_timeout_seconds"),
        "longest_build": allowed.value("build_timeout_seconds"),
        "presets": PRESETS,
        "most_steps": MAX_STEPS,
        "disk_from": MIN_DISK_MB,
        "disk_to": MAX_DISK_MB,
    }
    return render(request, "templates_app/new.html", context, status=status)


@require_safe
@console_page
def template_detail(request: ConsoleRequest, template_id: str) -> HttpResponse:
    """One template: the progress of its build, or its result."""
    template = services.get_template(request.actor, template_id)
    return detail_page(request, template)


def detail_page(
    request: ConsoleRequest, template: Template, refused: DomainError | None = None
) -> HttpResponse:
    """The page of one template; ``refused`` is why a requested action was not done."""
    line = requested_line(request.GET.get("line", ""))
    context = pages.detail_context(template, console_address(request), line)
    status = refused.status if refused else 200
    return render(
        request, "templates_app/detail.html", {**context, "refused": refused}, status=status
    )


def requested_line(text: str) -> pages.LineReference | None:
    """The line that ``?line=2-1234`` refers to; None if it is malformed."""
    found = _LINE.fullmatch(text)
    return pages.LineReference(int(found[1]), int(found[2])) if found else None


@require_http_methods(["GET", "HEAD", "POST"])
@console_page
def template_cancel(request: ConsoleRequest, template_id: str) -> HttpResponse:
    """Ask for confirmation, then cancel the build. The page is the dialog without a script."""
    template = services.get_template(request.actor, template_id)
    if request.method != "POST":
        return render(request, "templates_app/cancel.html", {"template": template})
    try:
        services.cancel_template(request.actor, template_id)
    except Conflict as error:
        return detail_page(request, template, error)
    return redirect("templates:detail", template_id)


@require_POST
@console_page
def template_rebuild(request: ConsoleRequest, template_id: str) -> HttpResponse:
    """Build the same again, as a new template; ``reuse=failed`` skips completed steps."""
    reuse: Literal["failed"] | None = "failed" if request.POST.get("reuse") == "failed" else None
    try:
        template = again.rebuild_template(request.actor, template_id, reuse=reuse)
    except NotFound:
        raise
    except DomainError as error:
        return detail_page(request, services.get_template(request.actor, template_id), error)
    return redirect("templates:detail", template.pk)


@require_http_methods(["GET", "HEAD", "POST"])
@console_page
def template_delete(request: ConsoleRequest, template_id: str) -> HttpResponse:
    """Ask for confirmation, then delete. The page replaces the dialog without a script."""
    template = services.get_template(request.actor, template_id)
    if request.method != "POST":
        return render(request, "templates_app/delete.html", {"template": template})
    try:
        services.delete_template(request.actor, template_id)
    except Conflict as error:
        context = {"template": template, "error": error.detail}
        return render(request, "templates_app/delete.html", context, status=error.status)
    messages.success(request, f"Template “{template.name}” was deleted.")
    return redirect("templates:list")
