"""The console's pages about sandboxes."""

from __future__ import annotations

from collections.abc import Callable

from django.contrib import messages
from django.http import HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_http_methods, require_POST, require_safe

from orkestr_console.accounts.actor import Actor
from orkestr_console.accounts.limits import envelope
from orkestr_console.core.addresses import console_address
from orkestr_console.core.errors import DomainError, HostUnavailable, NotFound
from orkestr_console.http.decorators import ConsoleRequest, console_page
from sandboxes_app import pages, services
from sandboxes_app.forms import CommandForm, SandboxForm, lifetimes, sizes
from sandboxes_app.models import Sandbox
from sandboxes_app.pages import Entry
from templates_app import services as template_services


@require_safe
@console_page
def sandbox_list(request: ConsoleRequest) -> HttpResponse:
    """The team's sandboxes, including ended ones."""
    cursor, status = request.GET.get("cursor") or None, request.GET.get("status") or None
    context = {**pages.list_context(request.actor, status, cursor), "cursor": cursor}
    return render(request, "sandboxes_app/list.html", context)


# A refused form repeats the variables typed, which may be secrets.
@never_cache
@require_http_methods(["GET", "HEAD", "POST"])
@console_page
def sandbox_new(request: ConsoleRequest) -> HttpResponse:
    """Show the form, or create a sandbox from it. A refused form keeps what was chosen."""
    if request.method != "POST":
        return form_page(request, SandboxForm(template=request.GET.get("template", "")))
    form = SandboxForm.from_post(request.POST)
    try:
        sandbox = services.create_sandbox(request.actor, form.spec())
    except DomainError as error:
        form.add_error(error)
        return form_page(request, form, error.status)
    return redirect("sandboxes:detail", sandbox.pk)


def form_page(request: ConsoleRequest, form: SandboxForm, status: int = 200) -> HttpResponse:
    """The page with the form; offers only what can boot now."""
    bases = template_services.list_bases(request.actor)
    allowed = envelope(request.actor.team, request.actor.user)
    context = {
        "allowed": allowed,
        "form": form,
        "built_in": [base for base in bases if base.group == "builtin"],
        "own": [base for base in bases if base.group == "team"],
        "known": {base.id for base in bases},
        "sizes": sizes(allowed),
        "lifetimes": lifetimes(allowed, form.timeout_seconds),
    }
    return render(request, "sandboxes_app/new.html", context, status=status)


@require_safe
@console_page
def sandbox_detail(request: ConsoleRequest, sandbox_id: str) -> HttpResponse:
    """One sandbox, with a form to run commands in it."""
    return detail_page(request, sandbox_id, CommandForm())


def detail_page(
    request: ConsoleRequest,
    sandbox_id: str,
    form: CommandForm,
    entry: Entry | None = None,
    refused: DomainError | None = None,
) -> HttpResponse:
    """The page of one sandbox; without a script, with the command just run.

    ``refused`` is why a requested action was not done.
    """
    sandbox = services.get_sandbox(request.actor, sandbox_id)
    address = console_address(request)
    shown = {"form": form, "entry": entry, "refused": refused, "sandbox_id": sandbox_id}
    context = {**pages.detail_context(sandbox, address), **shown}
    status = refused.status if refused else 200
    return render(request, "sandboxes_app/detail.html", context, status=status)


@require_POST
@console_page
def sandbox_exec(request: ConsoleRequest, sandbox_id: str) -> HttpResponse:
    """Run a command and show its result, even if that is an error.

    For a script the status is always 200: a failed command is a result, not an HTTP error.
    """
    form = CommandForm.from_post(request.POST)
    try:
        entry = run_command(request.actor, sandbox_id, form)
    except NotFound:
        raise
    except DomainError as error:
        form.add_error(error)
        entry = Entry(form.command, error=error)
    if request.htmx:
        context = {"entry": entry, "form": form, "sandbox_id": sandbox_id}
        response = render(request, "sandboxes_app/_entry.html", context)
        if entry.started:
            response.headers["HX-Trigger"] = "commands"
        return response
    next_form = (
        form if entry.error else CommandForm(cwd=form.cwd, timeout_seconds=form.timeout_seconds)
    )
    return detail_page(request, sandbox_id, next_form, entry)


def run_command(actor: Actor, sandbox_id: str, form: CommandForm) -> Entry:
    """Run the form's command to its end, or start it in the background."""
    if form.background:
        spec = form.background_spec()
        return Entry(form.command, started=services.start_command(actor, sandbox_id, spec))
    return Entry(form.command, answer=services.exec_command(actor, sandbox_id, form.spec()))


@require_safe
@console_page
def sandbox_egress(request: ConsoleRequest, sandbox_id: str) -> HttpResponse:
    """Its outbound requests: a fragment for the script, or a page of its own without one."""
    sandbox = services.get_sandbox(request.actor, sandbox_id)
    context: dict[str, object] = {"sandbox": sandbox}
    try:
        context["hosts"] = services.list_egress(request.actor, sandbox_id)
    except HostUnavailable as error:
        context["error"] = error.detail
    name = "_egress" if request.htmx else "egress"
    return render(request, f"sandboxes_app/{name}.html", context)


@require_http_methods(["GET", "HEAD", "POST"])
@console_page
def sandbox_terminate(request: ConsoleRequest, sandbox_id: str) -> HttpResponse:
    """Ask for confirmation, then terminate it. The page is the dialog without a script."""
    sandbox = services.get_sandbox(request.actor, sandbox_id)
    if request.method != "POST":
        return render(request, "sandboxes_app/terminate.html", {"sandbox": sandbox})
    services.terminate_sandbox(request.actor, sandbox_id)
    messages.success(request, f"The sandbox from {sandbox.template_name} was terminated.")
    return redirect("sandboxes:detail", sandbox_id)


@require_POST
@console_page
def sandbox_pause(request: ConsoleRequest, sandbox_id: str) -> HttpResponse:
    """Pause it, and show its page."""
    return run_action(request, sandbox_id, services.pause_sandbox)


@require_POST
@console_page
def sandbox_resume(request: ConsoleRequest, sandbox_id: str) -> HttpResponse:
    """Resume it, and show its page."""
    return run_action(request, sandbox_id, services.resume_sandbox)


def run_action(
    request: ConsoleRequest, sandbox_id: str, service: Callable[[Actor, str], Sandbox]
) -> HttpResponse:
    """Run a service, then show the sandbox, with the error if it was refused."""
    try:
        service(request.actor, sandbox_id)
    except NotFound:
        raise
    except DomainError as error:
        return detail_page(request, sandbox_id, CommandForm(), refused=error)
    return redirect("sandboxes:detail", sandbox_id)


@require_safe
@console_page
def template_use(request: ConsoleRequest, template_id: str) -> HttpResponse:
    """What uses a template: a fragment of its delete dialog, or a page without a script."""
    use = services.template_use(request.actor, template_id)
    name = "_of_template" if request.htmx else "of_template"
    return render(request, f"sandboxes_app/{name}.html", {"use": use})
