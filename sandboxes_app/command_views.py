"""The console's pages about commands that run in the background of a sandbox."""

from __future__ import annotations

from django.http import HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_POST, require_safe

from orkestr_console.core.errors import Conflict, DomainError, HostUnavailable, NotFound
from orkestr_console.core.text import plain
from orkestr_console.http.decorators import ConsoleRequest, console_page
from orkestr_console.ui.downloads import attachment
from sandboxes_app import pages, services


@require_safe
@console_page
def command_list(request: ConsoleRequest, sandbox_id: str) -> HttpResponse:
    """Its background commands: a fragment for the script, or a page without one."""
    sandbox = services.get_sandbox(request.actor, sandbox_id)
    context: dict[str, object] = {"sandbox": sandbox}
    try:
        commands = services.list_commands(request.actor, sandbox_id)
    except (Conflict, HostUnavailable) as error:
        context["error"] = error.detail
    else:
        context |= pages.commands_context(commands)
    name = "_commands" if request.htmx else "commands"
    return render(request, f"sandboxes_app/{name}.html", context)


@require_safe
@console_page
def command_detail(request: ConsoleRequest, sandbox_id: str, command_id: str) -> HttpResponse:
    """One command with the last part of its output; for the script, what changes of it."""
    sandbox = services.get_sandbox(request.actor, sandbox_id)
    try:
        logs = services.read_last_logs(request.actor, sandbox_id, command_id, pages.OUTPUT_BYTES)
    except (Conflict, NotFound) as error:
        if request.htmx:
            return last_state(request, error)
        raise
    context = {
        "sandbox": sandbox,
        "logs": logs,
        "command": pages.CommandRow(logs.command),
        "refusal": services.refusal_of(request.actor, logs.command),
    }
    name = "_command" if request.htmx else "command"
    return render(request, f"sandboxes_app/{name}.html", context)


def last_state(request: ConsoleRequest, error: DomainError) -> HttpResponse:
    """In the place of what asks again and again, why it has nothing more to ask for."""
    response = render(request, "sandboxes_app/_command_gone.html", {"error": error.detail})
    response["HX-Retarget"], response["HX-Reswap"] = "#command-poll", "outerHTML"
    return response


@require_safe
@console_page
def command_output(request: ConsoleRequest, sandbox_id: str, command_id: str) -> HttpResponse:
    """All that is kept of a command's output, without colours, as a file."""
    logs = services.read_logs(request.actor, sandbox_id, command_id, 0)
    response = attachment(f"{command_id}.txt", "text/plain; charset=utf-8")
    response.write(plain(logs.content))
    return response


@require_POST
@console_page
def command_stop(request: ConsoleRequest, sandbox_id: str, command_id: str) -> HttpResponse:
    """Kill it and all that it has started, and show it."""
    services.kill_command(request.actor, sandbox_id, command_id)
    return redirect("sandboxes:command", sandbox_id, command_id)
