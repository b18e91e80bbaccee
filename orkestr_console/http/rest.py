"""What every call of REST and of the health checks passes through, and nothing of what pages need.

Sessions, messages, forms, static files and templates mean nothing to an API call, so it skips the
middleware for them: it gets an id, its host name is checked, its view is found in a table, and its
errors are JSON. The server calls :func:`answer_call` on its event loop: a plain view runs in one
thread, and an ``async`` one asks for a thread when it needs the database
(:func:`orkestr_console.http.threads.in_thread`). In the middleware, :class:`Rest` does the same for
whoever calls Django itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from http import HTTPStatus
from inspect import iscoroutinefunction
from typing import Any, cast
from urllib.parse import unquote_to_bytes

from asgiref.sync import async_to_sync
from django.conf import settings
from django.core.handlers.exception import response_for_exception
from django.http import HttpRequest, HttpResponse, HttpResponseBase
from django.urls import URLPattern, URLResolver, get_resolver, get_urlconf
from django.utils.decorators import sync_and_async_middleware
from django.utils.log import log_response

from orkestr_console.core.errors import (
    Asleep,
    DomainError,
    InvalidInput,
    MethodNotAllowed,
    is_api_path,
    to_json_response,
)
from orkestr_console.core.postgres import release_connection, unavailable
from orkestr_console.http import idempotency, uploads
from orkestr_console.http.headers import API_HEADERS, REQUEST_ID_HEADER, choose_request_id
from orkestr_console.http.health import unknown_route
from orkestr_console.http.threads import view_in_thread
from orkestr_console.http.waking import call_again

type View = Callable[..., Any]

HEALTH_CHECKS = frozenset({"/healthz", "/readyz"})
READING = ("GET", "HEAD")
STRING_PARAMETER = "<str:"


def serves(path: str) -> bool:
    """Whether a call to ``path`` passes through here."""
    return is_api_path(path) or path in HEALTH_CHECKS


@dataclass(frozen=True)
class Route:
    """A view's address: literal segments, and the names of parameters (one segment each)."""

    segments: tuple[str, ...]
    names: tuple[str | None, ...]
    view: View

    def match(self, segments: list[str]) -> dict[str, str] | None:
        """The parameters if an address of as many segments is this one."""
        found = {}
        for given, literal, name in zip(segments, self.segments, self.names, strict=True):
            if name is None:
                if given != literal:
                    return None
            elif not given:
                return None
            else:
                found[name] = given
        return found


def find_view(path: str) -> tuple[View, dict[str, str]]:
    """The view behind an address, and its arguments. Faster than a search through expressions."""
    segments = path[1:].split("/")
    for route in routes(get_urlconf() or settings.ROOT_URLCONF).get(len(segments), ()):
        arguments = route.match(segments)
        if arguments is not None:
            return route.view, arguments
    return unknown_route, {}


@cache
def routes(urlconf: str) -> dict[int, list[Route]]:
    """All routes that pass through here, in their order, by their number of segments."""
    table: dict[int, list[Route]] = {}
    for address, view in addresses(get_resolver(urlconf).url_patterns, "/"):
        if serves(address):
            route = read_route(address, view)
            table.setdefault(len(route.segments), []).append(route)
    return table


def addresses(patterns: list[URLPattern | URLResolver], prefix: str) -> Iterator[tuple[str, View]]:
    """Every address and its view, in the order in which they are tried."""
    for each in patterns:
        address = prefix + str(each.pattern)
        if isinstance(each, URLResolver):
            yield from addresses(each.url_patterns, address)
        else:
            yield address, each.callback


def read_route(address: str, view: View) -> Route:
    """The route of a ``path()`` whose parameters are strings."""
    segments = tuple(address[1:].split("/"))
    names = [
        segment.removeprefix(STRING_PARAMETER).removesuffix(">")
        if segment.startswith(STRING_PARAMETER)
        else None
        for segment in segments
    ]
    return Route(segments, tuple(names), view)


async def answer_call(request: HttpRequest) -> HttpResponseBase:
    """The response to a call, which may still have to be streamed."""
    request_id = choose_request_id(request)
    try:
        view, arguments = begin(request)
        answer = partial(answer_awake, view, request, **arguments)
        if idempotency.is_keyed(request):
            response = await idempotency.answer_once(request, answer)
        else:
            response = await answer()
    except Exception as error:  # noqa: BLE001 - it is the answer
        response = refusal(request, error)
    return finished(request, response, request_id)


async def answer_awake(view: View, request: HttpRequest, **arguments: str) -> HttpResponseBase:
    """What a view answers, once what it found asleep is awake."""
    call = partial(answer_of, view, request, **arguments)
    try:
        return await call()
    except Asleep as asleep:
        return await call_again(asleep, call)


async def answer_of(view: View, request: HttpRequest, **arguments: str) -> HttpResponseBase:
    """What a view answers."""
    if iscoroutinefunction(view):
        return cast("HttpResponseBase", await view(request, **arguments))
    return await view_in_thread(view, request, **arguments)


def answer_here(request: HttpRequest) -> HttpResponseBase:
    """The same in this thread."""
    request_id = choose_request_id(request)
    try:
        view, arguments = begin(request)
        answer = partial(answer_awake, view, request, **arguments)
        if idempotency.is_keyed(request):
            response = async_to_sync(idempotency.answer_once)(request, answer)
        elif iscoroutinefunction(view):
            response = async_to_sync(answer)()
        else:
            response = answer_here_awake(view, request, arguments)
    except Exception as error:  # noqa: BLE001 - it is the answer
        response = refusal(request, error)
    finally:
        release_connection()
    return finished(request, response, request_id)


def answer_here_awake(
    view: View, request: HttpRequest, arguments: dict[str, str]
) -> HttpResponseBase:
    """:func:`answer_awake` of a view that is a plain function, in this thread."""
    try:
        return cast("HttpResponseBase", view(request, **arguments))
    except Asleep as asleep:
        again = partial(answer_of, view, request, **arguments)
        return async_to_sync(call_again)(asleep, again)


def begin(request: HttpRequest) -> tuple[View, dict[str, str]]:
    """The view and its arguments.

    Raises ``DisallowedHost``, ``MethodNotAllowed``, and ``InvalidInput`` for a NUL.
    """
    if request.path.startswith(uploads.PREFIX):
        # What follows is a secret, and logs show this of a request; views are found by path_info.
        request.path = f"{uploads.PREFIX}..."
    request.get_host()
    if request.path in HEALTH_CHECKS and request.method not in READING:
        raise MethodNotAllowed(str(request.method), READING)
    query = request.META.get("QUERY_STRING", "")
    # PostgreSQL would fail on one.
    if "\0" in request.path_info or ("%00" in query and b"\0" in unquote_to_bytes(query)):
        raise InvalidInput("The address must not contain NUL characters.")
    return find_view(request.path_info)


def refusal(request: HttpRequest, error: Exception) -> HttpResponse:
    """The response for an exception; call it while that is handled."""
    known = error if isinstance(error, DomainError) else unavailable(error)
    if known is not None:
        return to_json_response(known)
    return response_for_exception(request, error)


def finished(request: HttpRequest, response: HttpResponseBase, request_id: str) -> HttpResponseBase:
    """The response with its headers; an error of ours is logged."""
    headers = response.headers
    headers[REQUEST_ID_HEADER] = request_id
    for name, value in API_HEADERS.items():
        headers.setdefault(name, value)
    if settings.SECURE_HSTS_SECONDS and request.is_secure():
        headers.setdefault("Strict-Transport-Security", f"max-age={settings.SECURE_HSTS_SECONDS}")
    if isinstance(response, HttpResponse):
        headers.setdefault("Content-Length", str(len(response.content)))
        if response.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
            log_response(
                "%s: %s", response.reason_phrase, request.path, response=response, request=request
            )
    return response


@sync_and_async_middleware
def rest(
    get_response: Callable[[HttpRequest], Any],
) -> Callable[[HttpRequest], HttpResponseBase | Awaitable[HttpResponseBase]]:
    """Middleware, the outermost: answers calls without any of the others."""
    if asyncio.iscoroutinefunction(get_response):

        async def on_event_loop(request: HttpRequest) -> HttpResponseBase:
            if serves(request.path):
                return await answer_call(request)
            return cast("HttpResponseBase", await get_response(request))

        return on_event_loop

    def in_this_thread(request: HttpRequest) -> HttpResponseBase:
        if serves(request.path):
            return answer_here(request)
        return cast("HttpResponseBase", get_response(request))

    return in_this_thread
