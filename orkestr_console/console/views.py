"""Signing in and out, and where ``/`` leads."""

from __future__ import annotations

import time
from urllib.parse import urlencode

from django.conf import settings
from django.contrib.auth import authenticate, logout
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.urls import reverse
from django.utils.http import url_has_allowed_host_and_scheme
from django.views.decorators.cache import never_cache
from django.views.decorators.debug import sensitive_post_parameters
from django.views.decorators.http import require_http_methods, require_POST

from orkestr_console.accounts import second_factor, sessions
from orkestr_console.accounts.models import User
from orkestr_console.core.text import storage_problem

NO_MATCH = "Wrong email or password. Try again."
TOO_MANY = "Too many failed sign-ins for this address from here. Try again in {minutes} minutes."
# Who has typed the right password, and when: then the second step has this long.
PENDING_KEY = "signing_in"
PENDING_SECONDS = 300


def home(request: HttpRequest) -> HttpResponse:
    """The templates are what people come for."""
    return redirect("templates:list")


@sensitive_post_parameters("password")
@never_cache
@require_http_methods(["GET", "HEAD", "POST"])
def sign_in(request: HttpRequest) -> HttpResponse:
    """The form, and what it posts. Which of address and password was wrong is not said."""
    onward = safe_next(request)
    if request.user.is_authenticated:
        return redirect(onward)
    if request.method != "POST":
        return render(request, "console/sign_in.html", {"next": onward})
    email, password = request.POST.get("email", ""), request.POST.get("password", "")
    user = known_person(request, email, password)
    if user is None:
        context = {"next": onward, "email": email, "error": refusal(request)}
        return render(request, "console/sign_in.html", context, status=400)
    if second_factor.is_on(user):
        request.session[PENDING_KEY] = [user.pk, int(time.time())]
        return redirect(f"{reverse('console:sign_in_code')}?{urlencode({'next': onward})}")
    sessions.sign_in(request, user)
    return redirect(onward)


def known_person(request: HttpRequest, email: str, password: str) -> User | None:
    """Who this is; a refusal is on record in the team of whoever it was tried for."""
    if storage_problem(email) or storage_problem(password):
        return None
    # In lower case, so that guesses at one account are counted together.
    user = authenticate(request, username=email.strip().lower(), password=password)
    if isinstance(user, User):
        return user
    sessions.record_sign_in(
        email, sessions.client_address(request), user=None, error="Wrong password."
    )
    return None


def refusal(request: HttpRequest) -> str:
    """The sentence: the same for an account that does not exist."""
    if getattr(request, "axes_locked_out", False):
        return TOO_MANY.format(minutes=int(settings.AXES_COOLOFF_TIME.total_seconds() // 60))
    return NO_MATCH


@sensitive_post_parameters("code")
@never_cache
@require_http_methods(["GET", "HEAD", "POST"])
def sign_in_code(request: HttpRequest) -> HttpResponse:
    """The second step, for who has turned it on."""
    onward = safe_next(request)
    user = halfway_in(request)
    if user is None:
        return redirect("console:sign_in")
    context = {"next": onward}
    if request.method != "POST":
        return render(request, "console/sign_in_code.html", context)
    code = request.POST.get("code", "")
    if storage_problem(code) or not second_factor.verify(user, code):
        address = sessions.client_address(request)
        sessions.record_sign_in(user.email, address, user=None, error="Wrong code.")
        context["error"] = second_factor.WRONG_CODE
        return render(request, "console/sign_in_code.html", context, status=400)
    del request.session[PENDING_KEY]
    sessions.sign_in(request, user)
    return redirect(onward)


def halfway_in(request: HttpRequest) -> User | None:
    """Who has typed their password a moment ago."""
    user_id, at = request.session.get(PENDING_KEY) or (0, 0)
    if time.time() - at > PENDING_SECONDS:
        return None
    return User.objects.filter(pk=int(user_id), is_active=True).first()


@require_POST
def sign_out(request: HttpRequest) -> HttpResponse:
    """End the session."""
    sessions.record_sign_out(request)
    sessions.forget(request)
    logout(request)
    return redirect("console:sign_in")


def safe_next(request: HttpRequest) -> str:
    """Where to go after signing in: within this console only."""
    wanted = request.POST.get("next") or request.GET.get("next") or ""
    safe = url_has_allowed_host_and_scheme(
        wanted, allowed_hosts={request.get_host()}, require_https=request.is_secure()
    )
    return wanted if safe else settings.LOGIN_REDIRECT_URL
