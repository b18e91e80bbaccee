"""The page of a team's API tokens, for its admins."""

from __future__ import annotations

from typing import Any

from django.contrib import messages
from django.http import HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_http_methods, require_POST

import templates_app.services as templates
from orkestr_console.accounts import api_tokens
from orkestr_console.accounts.actor import EVERYTHING, READ, WRITE
from orkestr_console.accounts.limits import NETWORKS, envelope
from orkestr_console.accounts.models import Role
from orkestr_console.console.limits_forms import TokenForm
from orkestr_console.core.errors import DomainError
from orkestr_console.http.decorators import ConsoleRequest, console_page

SCOPE_WORDS = (
    (READ, "Look", "List and read templates and sandboxes."),
    (WRITE, "Use", "Build templates, start sandboxes, run commands, delete. Includes reading."),
    (EVERYTHING, "Everything", "Full access, including future permissions."),
)


@never_cache
@require_http_methods(["GET", "HEAD", "POST"])
@console_page
def tokens_page(request: ConsoleRequest) -> HttpResponse:
    """The tokens, and the form for a new one, whose text is shown once."""
    if not request.actor.is_at_least(Role.ADMIN):
        admins = envelope(request.actor.team).admins()
        return render(request, "console/tokens_members.html", {"admins": admins}, status=403)
    if request.method != "POST":
        return show(request, TokenForm())
    form = TokenForm.from_post(request.POST)
    try:
        spec = form.spec(base.id for base in templates.list_bases(request.actor))
        token, text = api_tokens.create_token(request.actor, spec)
    except DomainError as error:
        form.add_error(error)
        return show(request, form, error.status)
    return show(request, TokenForm(), made=token, text=text)


def show(request: ConsoleRequest, form: TokenForm, status: int = 200, **made: Any) -> HttpResponse:
    """The page."""
    context = {
        "form": form,
        "tokens": api_tokens.list_tokens(request.actor),
        "scopes": SCOPE_WORDS,
        "bases": templates.list_bases(request.actor),
        "networks": NETWORKS,
        **made,
    }
    return render(request, "console/tokens.html", context, status=status)


@require_POST
@console_page
def token_revoke(request: ConsoleRequest, token_id: str) -> HttpResponse:
    """End a token at once."""
    token = api_tokens.revoke(request.actor, token_id)
    messages.success(request, f"The token “{token.name}” was revoked. It no longer works.")
    return redirect("console:tokens")
