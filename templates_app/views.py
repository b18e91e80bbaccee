"""The console's pages about templates."""

from __future__ import annotations

from django.contrib import messages
from django.http import HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_http_methods, require_safe

from orkestr_console.accounts.limits import envelope
from orkestr_console.addresses import console_address
from orkestr_console.decorators import ConsoleRequest, console_page
from orkestr_console.errors import Conflict, DomainError, NotFound
from templates_app import pages, services
from templates_app.forms import PRESETS, TemplateForm
from templates_app.specs import MOST_STEPS


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
    """The form, and what it posts. A refusal keeps everything as it was typed."""
    if request.method != "POST":
        return form_page(request, prefilled(request))
    form = TemplateForm.typed(request.POST)
    try:
        template = services.create_template(request.actor, form.spec())
    except DomainError as error:
        form.take(error)
        return form_page(request, form, error.status)
    return redirect("templates:detail", template.pk)


def prefilled(request: ConsoleRequest) -> TemplateForm:
    """A form as ``?from=``, ``?preset=`` or ``?base=`` ask for it."""
    if source := request.GET.get("from"):
        form = TemplateForm.like(services.get_template(request.actor, source))
        form.allow_domains = f"{form.allow_domains} {request.GET.get('allow', '')}".strip()
        return form
    form = TemplateForm.preset(request.GET.get("preset", ""))
    form.base_template = request.GET.get("base") or form.base_template
    return form


def form_page(request: ConsoleRequest, form: TemplateForm, status: int = 200) -> HttpResponse:
    """The page with the form."""
    bases = services.list_bases(request.actor)
    context = {
        "form": form,
        "built_in": [base for base in bases if base.group == "builtin"],
        "own": [base for base in bases if base.group == "team"],
        "known": {base.id for base in bases},
        "usage": services.template_usage(request.actor),
        "allowed": envelope(request.actor.team, request.actor.user),
        "presets": PRESETS,
        "most_steps": MOST_STEPS,
    }
    return render(request, "templates_app/new.html", context, status=status)


@require_safe
@console_page
def template_detail(request: ConsoleRequest, template_id: str) -> HttpResponse:
    """One template: how its build goes, or what came of it."""
    template = services.get_template(request.actor, template_id)
    context = pages.detail_context(template, console_address(request))
    return render(request, "templates_app/detail.html", context)


@require_safe
@console_page
def step_output(request: ConsoleRequest, template_id: str, number: int) -> HttpResponse:
    """Everything that was kept of a step's output, as plain text."""
    template = services.get_template(request.actor, template_id)
    step = template.steps.filter(number=number).first()
    if step is None:
        raise NotFound("This template has no such step.")
    return HttpResponse(
        step.output or pages.printed(template, number), content_type="text/plain; charset=utf-8"
    )


@require_http_methods(["GET", "HEAD", "POST"])
@console_page
def template_delete(request: ConsoleRequest, template_id: str) -> HttpResponse:
    """Ask, then delete. The page asks where there is no script for the dialog."""
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
