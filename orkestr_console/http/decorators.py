"""Who may call a view. Each decorator checks and sets ``request.actor``, or responds early.

REST::

    @api(scope=READ)
    def list_templates(request: ApiRequest) -> HttpResponse: ...

    urlpatterns = [path("v1/templates", methods(GET=list_templates, POST=create_template))]

Console::

    @console_page
    def template_list(request: ConsoleRequest) -> HttpResponse: ...
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import iscoroutinefunction
from typing import Any, Concatenate, cast

from channels.db import database_sync_to_async
from django.contrib.auth.decorators import login_required
from django.http import HttpRequest, HttpResponse, HttpResponseBase
from django.views.decorators.csrf import csrf_exempt
from django_htmx.middleware import HtmxDetails

from orkestr_console.accounts import audit, services, sessions
from orkestr_console.accounts.actor import READ, Actor
from orkestr_console.accounts.models import User
from orkestr_console.core.errors import DomainError, MethodNotAllowed, RateLimited, Unauthenticated
from orkestr_console.core.postgres import unavailable
from orkestr_console.http.json_api import no_content


class ApiRequest(HttpRequest):
    """A REST request with a valid token."""

    actor: Actor
    request_id: str


class ConsoleRequest(HttpRequest):
    """A console request by a signed-in person, acting for their current team."""

    actor: Actor
    user: User
    htmx: HtmxDetails
    request_id: str


# Async views too, as in Django's own annotations.
type View = Callable[..., HttpResponseBase]


def api[**P](
    *, scope: str, methods: tuple[str, ...] = ()
) -> Callable[[Callable[Concatenate[ApiRequest, P], Any]], View]:
    """Require a Bearer token with ``scope``; set ``request.actor``.

    With ``methods``, other methods get 405, for views mapped without :func:`methods`. Works for
    plain and ``async`` views. The token is checked before the body is read.
    """

    def decorate(view: Callable[Concatenate[ApiRequest, P], Any]) -> View:
        def admit(request: HttpRequest) -> ApiRequest:
            require_method(request, methods)
            api_request = cast("ApiRequest", request)
            api_request.actor = authenticate(request)
            require_scope(api_request, scope)
            return api_request

        if iscoroutinefunction(view):

            @wraps(view)
            async def guarded_async(
                request: HttpRequest, *args: P.args, **kwargs: P.kwargs
            ) -> HttpResponseBase:
                api_request = await database_sync_to_async(admit)(request)
                return cast("HttpResponseBase", await view(api_request, *args, **kwargs))

            return cast("View", csrf_exempt(guarded_async))

        @wraps(view)
        def guarded(request: HttpRequest, *args: P.args, **kwargs: P.kwargs) -> HttpResponseBase:
            return cast("HttpResponseBase", view(admit(request), *args, **kwargs))

        return csrf_exempt(guarded)

    return decorate


def require_scope(request: ApiRequest, scope: str) -> None:
    """Raise ``InsufficientScope`` unless the token has it; records denied writes."""
    if scope == READ:
        request.actor.require(scope)
        return
    with audit.denials(request.actor, "api.call", "route", f"{request.method} {request.path}"):
        request.actor.require(scope)


def authenticate(request: HttpRequest) -> Actor:
    """The actor behind the request's Bearer token. Raises ``Unauthenticated`` (401)."""
    header = request.headers.get("Authorization", "")
    scheme, _, credentials = header.partition(" ")
    if not header:
        raise Unauthenticated
    if scheme.lower() != "bearer":
        raise Unauthenticated("The Authorization header must be 'Bearer' and your API token.")
    return services.authenticate_token(
        credentials.strip(" "), "rest", request.META.get("REMOTE_ADDR")
    )


def revalidate(request: HttpRequest, check: Callable[[Actor], object]) -> DomainError | None:
    """Why a response in progress must end; None while it may continue.

    Validates the token again, then its actor with ``check``. A rate-limited token is still valid,
    and so is one that cannot be checked because the database is briefly away: nobody can have
    revoked it meanwhile.
    """
    try:
        check(authenticate(request))
    except RateLimited:
        return None
    except DomainError as error:
        return error
    except Exception as error:
        if unavailable(error) is None:
            raise
    return None


def require_method(request: HttpRequest, methods: tuple[str, ...]) -> None:
    """Raise ``MethodNotAllowed`` unless the method is in ``methods``, or that is empty."""
    if methods and request.method not in methods:
        raise MethodNotAllowed(str(request.method), methods)


def methods(**views: View) -> Callable[..., HttpResponseBase]:
    """One view from one per method: ``methods(GET=…, POST=…)``.

    GET also handles HEAD, OPTIONS lists the methods, and anything else gets 405.
    """
    routes = {**views, **({"HEAD": views["GET"]} if "GET" in views else {})}
    allowed = (*routes, "OPTIONS")

    def route(request: HttpRequest) -> View:
        if request.method == "OPTIONS":
            return options
        if request.method not in routes:
            raise MethodNotAllowed(str(request.method), allowed)
        return routes[request.method]

    def options(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        response = no_content()
        response.headers["Allow"] = ", ".join(allowed)
        return response

    def dispatch(request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        return route(request)(request, *args, **kwargs)

    if any(iscoroutinefunction(view) for view in views.values()):
        # Django awaits the result of a view that is a coroutine function.
        async def dispatch_async(request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
            view = route(request)
            if iscoroutinefunction(view):
                return await view(request, *args, **kwargs)
            return await database_sync_to_async(view)(request, *args, **kwargs)

        return cast("Callable[..., HttpResponseBase]", csrf_exempt(dispatch_async))
    return csrf_exempt(dispatch)


def console_page[**P](
    view: Callable[Concatenate[ConsoleRequest, P], HttpResponseBase],
) -> Callable[..., HttpResponseBase]:
    """Require a signed-in person with a team, else redirect to sign-in; set ``request.actor``."""

    @wraps(view)
    @login_required
    def guarded(request: HttpRequest, *args: P.args, **kwargs: P.kwargs) -> HttpResponseBase:
        known = cast("ConsoleRequest", request)
        known.actor = services.session_actor(request)
        sessions.touch(request)
        return view(known, *args, **kwargs)

    return guarded
