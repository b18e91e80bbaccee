"""Signing in and out, and where ``/`` leads."""

from __future__ import annotations

from django.conf import settings
from django.contrib.auth import authenticate, login, logout
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.utils.http import url_has_allowed_host_and_scheme
from django.views.decorators.cache import never_cache
from django.views.decorators.debug import sensitive_post_parameters
from django.views.decorators.http import require_http_methods, require_POST

from orkestr_console.text import unusable

NO_MATCH = "That email address and password do not belong together. Check both and try again."


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
    usable = not (unusable(email) or unusable(password))
    user = authenticate(request, username=email.strip(), password=password) if usable else None
    if user is None:
        context = {"next": onward, "email": email, "error": NO_MATCH}
        return render(request, "console/sign_in.html", context, status=400)
    login(request, user)
    return redirect(onward)


@require_POST
def sign_out(request: HttpRequest) -> HttpResponse:
    """End the session."""
    logout(request)
    return redirect("console:sign_in")


def safe_next(request: HttpRequest) -> str:
    """Where to go after signing in: within this console only."""
    wanted = request.POST.get("next") or request.GET.get("next") or ""
    safe = url_has_allowed_host_and_scheme(
        wanted, allowed_hosts={request.get_host()}, require_https=request.is_secure()
    )
    return wanted if safe else settings.LOGIN_REDIRECT_URL
