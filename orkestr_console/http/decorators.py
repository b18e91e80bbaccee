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

from collections.abc import Callable, Iterable
from functools import wraps
from inspect import iscoroutinefunction, isgeneratorfunction
from typing import Any, Concatenate, cast

from django.contrib.auth.decorators import login_required
from django.db import models
from django.http import HttpRequest, HttpResponse, HttpResponseBase
from django_htmx.middleware import HtmxDetails

from orkestr_console.accounts import audit, services, sessions
from orkestr_console.accounts.actor import READ, Actor, Subject
from orkestr_console.accounts.models import User
from orkestr_console.core.errors import DomainError, MethodNotAllowed, RateLimited, Unauthenticated
from orkestr_console.core.hosts import Steps
from orkestr_console.core.postgres import unavailable
from orkestr_console.http.describing import require_known_parameters
from orkestr_console.http.json_api import no_content
from orkestr_console.http.steps import run_in_threads
from orkestr_console.http.threads import in_thread, view_in_thread


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


# Where a request has the actor that was authenticated ahead of its view.
AHEAD = "orkestr_ahead"

# Where a view has the scope that it needs, and a function the views of its methods.
SCOPE, VIEWS = "orkestr_scope", "orkestr_views"

# Async views too, as in Django's own annotations.
type View = Callable[..., HttpResponseBase]


def api[**P](
    *,
    scope: str,
    methods: tuple[str, ...] = (),
    first: Callable[Concatenate[ApiRequest, P], Any] | None = None,
    subject: type[models.Model] | None = None,
) -> Callable[[Callable[..., Any]], View]:
    """Require a Bearer token with ``scope``; set ``request.actor``.

    With ``methods``, other methods get 405, for views mapped without :func:`methods`. Works for
    plain and ``async`` views, and for views in steps (:mod:`orkestr_console.core.hosts`), the first
    of which also checks the token. The token is checked before the body is read. An ``async`` view
    may have a part that comes ``first``, in the thread that checks the token: it takes the view's
    arguments, and the view gets what it returns instead. The row of ``subject`` that the address
    names first is read with the token.
    """

    def admit(request: HttpRequest, keys: Iterable[object]) -> ApiRequest:
        require_method(request, methods)
        api_request = cast("ApiRequest", request)
        key = next(iter(keys), None)
        about = Subject(subject, str(key)) if subject is not None and key is not None else None
        ahead: Actor | None = vars(request).pop(AHEAD, None)
        api_request.actor = ahead or authenticate(request, about)
        require_scope(api_request, scope)
        return api_request

    def decorate(view: Callable[..., Any]) -> View:
        guarded = _guarded(view, admit, first)
        setattr(guarded, SCOPE, scope)
        return guarded

    return decorate


def admits_itself(view: Callable[..., Any]) -> View:
    """An ``async`` view without a token: its address says what it may do, and for whom."""
    return cast("View", view)


def _guarded(
    view: Callable[..., Any],
    admit: Callable[[HttpRequest, Iterable[object]], ApiRequest],
    first: Callable[..., Any] | None,
) -> View:
    """A view of any kind, whose caller is admitted first."""
    if iscoroutinefunction(view):
        return _guarded_on_event_loop(view, admit, first)
    if isgeneratorfunction(view):
        return _guarded_in_steps(view, admit)

    @wraps(view)
    def guarded(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        return cast("HttpResponseBase", view(admit(request, kwargs.values()), *args, **kwargs))

    return guarded


def _guarded_on_event_loop(
    view: Callable[..., Any],
    admit: Callable[[HttpRequest, Iterable[object]], ApiRequest],
    first: Callable[..., Any] | None,
) -> View:
    """An ``async`` view whose caller is admitted in a thread, in which ``first`` runs as well."""

    def begin(request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        api_request = admit(request, kwargs.values())
        return first(api_request, *args, **kwargs) if first else None

    @wraps(view)
    async def guarded(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        begun = await in_thread(begin, request, *args, **kwargs)
        if first is not None:
            return cast("HttpResponseBase", await view(request, begun))
        return cast("HttpResponseBase", await view(request, *args, **kwargs))

    return cast("View", guarded)


def _guarded_in_steps(
    view: Callable[..., Steps[HttpResponseBase]],
    admit: Callable[[HttpRequest, Iterable[object]], ApiRequest],
) -> View:
    def steps(request: HttpRequest, *args: Any, **kwargs: Any) -> Steps[HttpResponseBase]:
        return (yield from view(admit(request, kwargs.values()), *args, **kwargs))

    @wraps(view)
    async def guarded(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        return await run_in_threads(steps(request, *args, **kwargs))

    return cast("View", guarded)


def authenticate_ahead(request: HttpRequest) -> Actor:
    """Like :func:`authenticate`, before the view does: it takes this actor, and counts no call."""
    actor = authenticate(request)
    vars(request)[AHEAD] = actor
    return actor


def require_scope(request: ApiRequest, scope: str) -> None:
    """Raise ``InsufficientScope`` unless the token has it; records denied writes."""
    if scope == READ:
        request.actor.require(scope)
        return
    with audit.denials(request.actor, "api.call", "route", f"{request.method} {request.path}"):
        request.actor.require(scope)


def authenticate(request: HttpRequest, subject: Subject | None = None) -> Actor:
    """The actor of the request's Bearer token, and its ``subject``. Raises ``Unauthenticated``."""
    # Not request.headers, which is made of all of them.
    header = request.META.get("HTTP_AUTHORIZATION", "")
    scheme, _, credentials = header.partition(" ")
    if not header:
        raise Unauthenticated
    if scheme.lower() != "bearer":
        raise Unauthenticated("The Authorization header must be 'Bearer' and your API token.")
    return services.authenticate_token(
        credentials.strip(" "), "rest", request.META.get("REMOTE_ADDR"), subject
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

    GET also handles HEAD, OPTIONS lists the methods, and anything else gets 405. What is not a
    parameter of a view that is described (:mod:`orkestr_console.http.describing`) gets 400.
    """
    routes = {**views, **({"HEAD": views["GET"]} if "GET" in views else {})}
    allowed = (*routes, "OPTIONS")

    def route(request: HttpRequest) -> View:
        if request.method == "OPTIONS":
            return options
        if request.method not in routes:
            raise MethodNotAllowed(str(request.method), allowed)
        view = routes[request.method]
        require_known_parameters(view, request)
        return view

    def options(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        response = no_content()
        response.headers["Allow"] = ", ".join(allowed)
        return response

    def dispatch(request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        return route(request)(request, *args, **kwargs)

    async def dispatch_async(request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        view = route(request)
        if iscoroutinefunction(view):
            return await view(request, *args, **kwargs)
        return await view_in_thread(view, request, *args, **kwargs)

    is_async = any(iscoroutinefunction(view) for view in views.values())
    chosen = cast("Callable[..., HttpResponseBase]", dispatch_async if is_async else dispatch)
    setattr(chosen, VIEWS, views)
    return chosen


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
