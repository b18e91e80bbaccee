"""Middleware of pages: request ids, releasing the database connection, browser headers,
compression, static files, refusing NUL, and domain errors as responses. API calls skip it
(:mod:`.rest`).
"""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from django.http import HttpRequest, HttpResponse, HttpResponseBase
from django.middleware.gzip import GZipMiddleware
from whitenoise.middleware import WhiteNoiseMiddleware

from orkestr_console.core.errors import (
    DomainError,
    InvalidInput,
    to_json_response,
    to_response,
)
from orkestr_console.core.postgres import release_connection, unavailable
from orkestr_console.http.headers import PERMISSIONS, REQUEST_ID_HEADER, choose_request_id

type Handler = Callable[[HttpRequest], HttpResponseBase]


def request_id(get_response: Handler) -> Handler:
    """Give every request an id, and every response the header ``X-Request-Id``."""

    def middleware(request: HttpRequest) -> HttpResponseBase:
        value = choose_request_id(request)
        response = get_response(request)
        response.headers[REQUEST_ID_HEADER] = value
        return response

    return middleware


def release_database(get_response: Handler) -> Handler:
    """Release the request's database connection before the response is sent, not after.

    A slow reader may take a minute over a large page, and would hold a connection that long.
    """

    def middleware(request: HttpRequest) -> HttpResponseBase:
        try:
            return get_response(request)
        finally:
            release_connection()

    return middleware


def browser_headers(get_response: Handler) -> Handler:
    """Set the browser headers that Django's own middleware doesn't.

    Other sites may not embed our responses (Cross-Origin-Resource-Policy), pages may use no devices
    (Permissions-Policy), and shared caches store no response (RFC 9111, 5.2.2) unless it says
    otherwise, as static files do.
    """

    def middleware(request: HttpRequest) -> HttpResponseBase:
        response = get_response(request)
        response.headers.setdefault("Cross-Origin-Resource-Policy", "same-origin")
        response.headers.setdefault("Permissions-Policy", PERMISSIONS)
        uncacheable = response.status_code >= HTTPStatus.BAD_REQUEST
        cache_control = "no-store" if uncacheable else "private, no-cache"
        response.headers.setdefault("Cache-Control", cache_control)
        return response

    return middleware


class CompressedPages(GZipMiddleware):
    """Compress pages that were only asked for.

    A secret could be guessed from the length of a page that also repeats what an attacker chose
    (BREACH). So Django adds random bytes to each; forms' tokens are masked anew each time; cookies
    are not sent from other sites; and what a form answers, such as a new token, is left as it is.
    """

    def process_response(self, request: HttpRequest, response: HttpResponseBase) -> Any:
        """The response, compressed if it is a page and the browser can read that."""
        page = response.headers.get("Content-Type", "").startswith("text/html")
        if request.method == "GET" and page and not response.streaming:
            return super().process_response(request, response)
        return response


def reject_nul(get_response: Handler) -> Handler:
    """Refuse a path or query with NUL, on which PostgreSQL would fail."""

    def middleware(request: HttpRequest) -> HttpResponseBase:
        query = request.META.get("QUERY_STRING", "")
        if "\0" in request.path or b"\0" in unquote_to_bytes(query):
            return to_json_response(InvalidInput("The address must not contain NUL characters."))
        return get_response(request)

    return middleware


class StaticFiles(WhiteNoiseMiddleware):  # type: ignore[misc]
    """Static files, each in one piece: Django streams badly under ASGI, and ours are small."""

    def add_files(self, root: str, prefix: str | None = None) -> None:
        """Add a directory of files; a missing one (in a test run) is ignored."""
        if Path(root).is_dir():
            super().add_files(root, prefix)

    @staticmethod
    def serve(static_file: Any, request: HttpRequest) -> HttpResponse:
        """A file, or the part or the 304 that the request asks for."""
        file_response = static_file.get_response(request.method, request.META)
        body = b""
        if file_response.file is not None:
            with file_response.file:
                body = file_response.file.read()
        return HttpResponse(
            body, status=int(file_response.status), headers=dict(file_response.headers)
        )


class DomainErrors:
    """Turn a view's ``DomainError`` into its surface's response."""

    def __init__(self, get_response: Handler) -> None:
        self._get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponseBase:
        """Pass the request on unchanged."""
        return self._get_response(request)

    def process_exception(self, request: HttpRequest, error: Exception) -> HttpResponseBase | None:
        """The response for an exception that a view raised; None for others."""
        domain_error = error if isinstance(error, DomainError) else unavailable(error)
        return to_response(request, domain_error) if domain_error is not None else None
