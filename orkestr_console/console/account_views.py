"""A person's own account: name, password, two-step sign-in and sessions."""

from __future__ import annotations

from typing import Any

from django.contrib import messages
from django.contrib.auth import update_session_auth_hash
from django.http import HttpResponse
from django.shortcuts import redirect, render
from django.utils.cache import add_never_cache_headers
from django.utils.safestring import mark_safe
from django.views.decorators.debug import sensitive_post_parameters
from django.views.decorators.http import require_POST, require_safe

from orkestr_console.accounts import account, second_factor, sessions
from orkestr_console.core.errors import InvalidInput
from orkestr_console.http.decorators import ConsoleRequest, console_page


@require_safe
@console_page
def account_page(request: ConsoleRequest) -> HttpResponse:
    """The account page."""
    return show(request)


def show(request: ConsoleRequest, status: int = 200, **more: Any) -> HttpResponse:
    """The page; ``errors`` maps fields to messages."""
    user = request.user
    device = second_factor.pending(user)
    context = {
        "sessions": sessions.list_sessions(user),
        "this_session": request.session.session_key,
        "second_factor": second_factor.is_on(user),
        "codes_left": second_factor.codes_left(user),
        "device": device,
        # Our own rendering of our own secret.
        "picture": mark_safe(second_factor.qr_code(device)) if device else "",  # noqa: S308
        "secret": second_factor.secret_text(device) if device else "",
        "name": user.name,
        **more,
    }
    # The page contains any secret that waits for its first code, whichever form was sent.
    response = render(request, "console/account.html", context, status=status)
    add_never_cache_headers(response)
    return response


@require_POST
@console_page
def account_name(request: ConsoleRequest) -> HttpResponse:
    """Change the display name."""
    name = request.POST.get("name", "").strip()
    try:
        account.change_name(request.actor, name)
    except InvalidInput as error:
        return show(request, 400, name=name, errors=error.fields)
    messages.success(request, "Your name was saved.")
    return redirect("console:account")


@sensitive_post_parameters("current", "password")
@require_POST
@console_page
def account_password(request: ConsoleRequest) -> HttpResponse:
    """Change the password, which signs out all other browsers."""
    current, password = (request.POST.get(field, "") for field in ("current", "password"))
    try:
        account.change_password(request.actor, current, password, request.session.session_key)
    except InvalidInput as error:
        return show(request, 400, errors=error.fields)
    user = request.user
    sessions.forget(request)
    update_session_auth_hash(request, user)
    sessions.record_session(request, user)
    messages.success(request, "Your password was changed, and every other browser signed out.")
    return redirect("console:account")


@require_POST
@console_page
def session_end(request: ConsoleRequest, session_id: int) -> HttpResponse:
    """Sign out one browser."""
    account.end_session(request.actor, session_id)
    messages.success(request, "That browser was signed out.")
    return redirect("console:account")


@require_POST
@console_page
def sessions_end_others(request: ConsoleRequest) -> HttpResponse:
    """Sign out all other browsers."""
    ended = account.end_other_sessions(request.actor, request.session.session_key)
    messages.success(request, f"{ended} other browsers were signed out.")
    return redirect("console:account")


@require_POST
@console_page
def second_factor_begin(request: ConsoleRequest) -> HttpResponse:
    """Show a secret to scan."""
    account.begin_second_factor(request.actor)
    return redirect("console:account")


@require_POST
@console_page
def second_factor_confirm(request: ConsoleRequest) -> HttpResponse:
    """Turn it on; the recovery codes are shown once."""
    try:
        codes = account.confirm_second_factor(request.actor, request.POST.get("code", ""))
    except InvalidInput as error:
        return show(request, 400, errors={"code": error.detail})
    return show(request, codes=codes)


@sensitive_post_parameters("current")
@require_POST
@console_page
def second_factor_off(request: ConsoleRequest) -> HttpResponse:
    """Turn it off, given the password."""
    try:
        account.turn_off_second_factor(request.actor, request.POST.get("current", ""))
    except InvalidInput as error:
        return show(request, 400, errors=error.fields)
    messages.success(request, "Two-step sign-in is off.")
    return redirect("console:account")
