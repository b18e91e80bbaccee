"""What every request passes.

A request id, the database's connection given back, rules for browsers, the client's address, a
refusal of unusable text, errors made answers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from django.http import HttpRequest, HttpResponse, HttpResponseBase
from ulid import ULID
from whitenoise.middleware import WhiteNoiseMiddleware

from orkestr_console.core.errors import (
    DomainError,
    InvalidInput,
    is_api,
    to_json_response,
    to_response,
)
from orkestr_console.core.postgres import release_connection, unavailable

type Handler = Callable[[HttpRequest], HttpResponseBase]

REQUEST_ID_HEADER = "X-Request-Id"
# What a proxy in front or a client may have chosen; anything else is replaced.
_USABLE_ID = re.compile(r"[A-Za-z0-9._:-]{8,64}", re.ASCII)


def request_id(get_response: Handler) -> Handler:
    """Give every request an id, and every response the header ``X-Request-Id``."""

    def middleware(request: HttpRequest) -> HttpResponseBase:
        header = request.headers.get(REQUEST_ID_HEADER, "")
        value = header if _USABLE_ID.fullmatch(header) else f"req_{ULID()}"
        request.request_id = value  # type: ignore[attr-defined]
        response = get_response(request)
        response.headers[REQUEST_ID_HEADER] = value
        return response

    return middleware


def release_database(get_response: Handler) -> Handler:
    """Give the request's database connection back before the answer is sent, not after.

    Whoever reads slowly may take a minute over a large page, and would have a connection that long.
    """

    def middleware(request: HttpRequest) -> HttpResponseBase:
        try:
            return get_response(request)
        finally:
            release_connection()

    return middleware


# What no page of ours uses, nobody who got into one may use either.
PERMISSIONS = ", ".join(
    [
        *(
            f"{feature}=()"
            for feature in (
                "accelerometer",
                "browsing-topics",
                "camera",
                "display-capture",
                "geolocation",
                "gyroscope",
                "hid",
                "magnetometer",
                "microphone",
                "midi",
                "payment",
                "publickey-credentials-get",
                "screen-wake-lock",
                "serial",
                "usb",
                "xr-spatial-tracking",
            )
        ),
        "clipboard-write=(self)",
    ]
)


def browser_headers(get_response: Handler) -> Handler:
    """Say to browsers what Django's own middleware does not.

    Other sites may not embed what is here (Cross-Origin-Resource-Policy), pages may use no devices
    (Permissions-Policy), and no cache that several people share keeps an answer (RFC 9111, 5.2.2)
    unless the answer itself says otherwise, as static files do.
    """

    def middleware(request: HttpRequest) -> HttpResponseBase:
        response = get_response(request)
        response.headers.setdefault("Cross-Origin-Resource-Policy", "same-origin")
        response.headers.setdefault("Permissions-Policy", PERMISSIONS)
        uncacheable = is_api(request) or response.status_code >= HTTPStatus.BAD_REQUEST
        cache_control = "no-store" if uncacheable else "private, no-cache"
        response.headers.setdefault("Cache-Control", cache_control)
        return response

    return middleware


def reject_nul(get_response: Handler) -> Handler:
    """Refuse a path or query with NUL in it, which PostgreSQL would answer with an error."""

    def middleware(request: HttpRequest) -> HttpResponseBase:
        query = request.META.get("QUERY_STRING", "")
        if "\0" in request.path or b"\0" in unquote_to_bytes(query):
            return to_json_response(InvalidInput("The address must not contain NUL characters."))
        return get_response(request)

    return middleware


class StaticFiles(WhiteNoiseMiddleware):  # type: ignore[misc]
    """Static files, whole: Django streams a file badly under ASGI, and ours are small."""

    def add_files(self, root: str, prefix: str | None = None) -> None:
        """Take up a directory of files; one that is not there (a test run) is no trouble."""
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
    """Turn a ``DomainError`` that a view raises into the answer its surface understands."""

    def __init__(self, get_response: Handler) -> None:
        self._get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponseBase:
        """Pass the request on as it is."""
        return self._get_response(request)

    def process_exception(self, request: HttpRequest, error: Exception) -> HttpResponseBase | None:
        """Django calls this with whatever the view raised."""
        domain_error = error if isinstance(error, DomainError) else unavailable(error)
        return to_response(request, domain_error) if domain_error is not None else None
