"""The page that connects an agent: snippets for common clients, and a token for them."""

from __future__ import annotations

from typing import Any

from django.http import HttpResponse
from django.shortcuts import render
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_http_methods

from orkestr_console.accounts import api_tokens
from orkestr_console.accounts.limits import envelope
from orkestr_console.accounts.models import Role
from orkestr_console.console import connect
from orkestr_console.console.limits_forms import AgentForm
from orkestr_console.core.addresses import MCP_PATH, console_address
from orkestr_console.core.errors import DomainError
from orkestr_console.http.decorators import ConsoleRequest, console_page

ACCESS_WORDS = (
    ("write", "Read and write", "Build templates, start sandboxes, run commands, delete."),
    ("read", "Read only", "List and read. Only tools that change nothing are offered."),
)


@never_cache
@require_http_methods(["GET", "HEAD", "POST"])
@console_page
def connect_page(request: ConsoleRequest) -> HttpResponse:
    """The snippets; they contain a token's text only in the response that created it."""
    if request.method != "POST":
        return show(request, AgentForm())
    form = AgentForm.from_post(request.POST)
    if not request.actor.is_at_least(Role.ADMIN):
        return show(request, form, 403)
    try:
        token, text = api_tokens.create_token(request.actor, form.spec())
    except DomainError as error:
        form.add_error(error)
        return show(request, form, error.status)
    return show(request, form, made=token, text=text)


def show(
    request: ConsoleRequest, form: AgentForm, status: int = 200, *, text: str = "", **made: Any
) -> HttpResponse:
    """The page, opened at the client that the form was sent from."""
    url = f"{console_address(request)}{MCP_PATH}"
    token = text or connect.PLACEHOLDER
    guides = connect.guides(url, token)
    keys = [guide.key for guide in guides]
    context = {
        "form": form,
        "access": ACCESS_WORDS,
        "may_make": request.actor.is_at_least(Role.ADMIN),
        "admins": envelope(request.actor.team).admins(),
        "url": url,
        "exposed": connect.is_exposed(url),
        "token": token,
        "text": text,
        "guides": guides,
        "chosen": form.client if form.client in keys else keys[0],
        **made,
    }
    return render(request, "console/connect.html", context, status=status)
