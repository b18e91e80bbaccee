"""A person's own account: name, password, two-step sign-in, and where they are signed in."""

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

from orkestr_console.accounts import people, second_factor, sessions
from orkestr_console.decorators import ConsoleRequest, console_page
from orkestr_console.errors import InvalidInput
from orkestr_console.text import unreadable

WRONG_PASSWORD = "This is not your password."  # noqa: S105 - a sentence
LONGEST_NAME = 100


@require_safe
@console_page
def account_page(request: ConsoleRequest) -> HttpResponse:
    """Everything about the account."""
    return show(request)


def show(request: ConsoleRequest, status: int = 200, **more: Any) -> HttpResponse:
    """The page; ``errors`` are sentences by field."""
    user = request.user
    device = second_factor.pending(user)
    context = {
        "sessions": sessions.list_sessions(user),
        "this_session": request.session.session_key,
        "second_factor": second_factor.is_on(user),
        "codes_left": second_factor.codes_left(user),
        "device": device,
        # Our own drawing of our own secret.
        "picture": mark_safe(second_factor.picture(device)) if device else "",  # noqa: S308
        "secret": second_factor.secret_of(device) if device else "",
        "name": user.name,
        **more,
    }
    # A secret that waits for its first code is on it, whichever form it answers.
    response = render(request, "console/account.html", context, status=status)
    add_never_cache_headers(response)
    return response


@require_POST
@console_page
def account_name(request: ConsoleRequest) -> HttpResponse:
    """What the console calls the person."""
    name = request.POST.get("name", "").strip()
    problem = unreadable(name) or (
        f"Your name has at most {LONGEST_NAME} characters." if len(name) > LONGEST_NAME else ""
    )
    if problem:
        return show(request, 400, name=name, errors={"name": problem})
    request.user.name = name
    request.user.save(update_fields=["name"])
    messages.success(request, "Your name was saved.")
    return redirect("console:account")


@sensitive_post_parameters("current", "password")
@require_POST
@console_page
def account_password(request: ConsoleRequest) -> HttpResponse:
    """A new password, which signs every other browser out."""
    user, password = request.user, request.POST.get("password", "")
    if not user.check_password(request.POST.get("current", "")):
        return show(request, 400, errors={"current": WRONG_PASSWORD})
    try:
        people.require_strong(password, user)
    except InvalidInput as error:
        return show(request, 400, errors=error.fields)
    sessions.end_other_sessions(user, request.session.session_key)
    user.set_password(password)
    user.save(update_fields=["password"])
    sessions.forget(request)
    update_session_auth_hash(request, user)
    sessions.remember(request, user)
    messages.success(request, "Your password was changed, and every other browser signed out.")
    return redirect("console:account")


@require_POST
@console_page
def session_end(request: ConsoleRequest, session_id: int) -> HttpResponse:
    """Sign one browser out."""
    sessions.end_session(request.user, session_id)
    messages.success(request, "That browser was signed out.")
    return redirect("console:account")


@require_POST
@console_page
def sessions_end_others(request: ConsoleRequest) -> HttpResponse:
    """Sign every other browser out."""
    ended = sessions.end_other_sessions(request.user, request.session.session_key)
    messages.success(request, f"{ended} other browsers were signed out.")
    return redirect("console:account")


@require_POST
@console_page
def second_factor_begin(request: ConsoleRequest) -> HttpResponse:
    """Show a secret to scan."""
    second_factor.begin(request.user)
    return redirect("console:account")


@require_POST
@console_page
def second_factor_confirm(request: ConsoleRequest) -> HttpResponse:
    """Turn it on; the recovery codes are shown once."""
    try:
        codes = second_factor.confirm(request.user, request.POST.get("code", ""))
    except InvalidInput as error:
        return show(request, 400, errors={"code": error.detail})
    return show(request, codes=codes)


@sensitive_post_parameters("current")
@require_POST
@console_page
def second_factor_off(request: ConsoleRequest) -> HttpResponse:
    """Turn it off, which needs the password."""
    if not request.user.check_password(request.POST.get("current", "")):
        return show(request, 400, errors={"off": WRONG_PASSWORD})
    second_factor.turn_off(request.user)
    messages.success(request, "Two-step sign-in is off.")
    return redirect("console:account")
