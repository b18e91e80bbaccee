"""Views of no app: health checks, unknown routes, and Django's own error handlers."""

from __future__ import annotations

import sys
from http import HTTPStatus
from typing import Literal, NotRequired, TypedDict

from django.core.exceptions import DisallowedHost, RequestDataTooBig
from django.http import HttpRequest, HttpResponse, JsonResponse

from orkestr_console.core.errors import (
    Forbidden,
    Internal,
    InvalidInput,
    NotFound,
    PayloadTooLarge,
    is_api,
    to_console_response,
    to_json_response,
    to_response,
)
from orkestr_console.core.postgres import unavailable
from orkestr_console.http.decorators import authenticate
from orkestr_console.http.describing import describe
from orkestr_console.http.readiness import is_ready, readiness
from orkestr_console.settings import LARGEST_BODY

OTHER_SERVICES = "/api"
OTHER_SERVICE = (
    "This console has no such API route: it serves templates and sandboxes, and the account calls "
    "for signing in."
)


class Health(TypedDict):
    """What a process that serves requests answers."""

    status: str


class ReadinessCheck(TypedDict):
    """The last result of one check, and its age; `detail` if there is something to say."""

    state: str
    age_seconds: float | None
    detail: NotRequired[str]


class Readiness(TypedDict):
    """What requests need, and whether it is there."""

    status: Literal["ready", "not_ready"]
    checks: dict[str, ReadinessCheck]


@describe("Whether the process serves requests", answer=Health)
async def healthz(request: HttpRequest) -> JsonResponse:
    """200 while the process serves requests. It depends on nothing else."""
    return JsonResponse({"status": "ok"})


@describe(
    "Whether everything that requests need is there",
    answer=Readiness,
    statuses={503: "Not everything is."},
)
def readyz(request: HttpRequest) -> JsonResponse:
    """200 when every dependency of requests is ok, else 503; with each one's state and age.

    These are the last results of :mod:`orkestr_console.http.readiness`: this waits for nothing.
    """
    readiness.start()
    checks = readiness.checks()
    ready = is_ready(checks)
    details = {name: check.to_wire() for name, check in checks.items()}
    answer = JsonResponse(
        {"status": "ready" if ready else "not_ready", "checks": details},
        status=HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE,
        headers={"Cache-Control": "no-store", **({} if ready else {"Retry-After": "2"})},
    )
    # Not an error, though Django logs each 5xx as one; and a starting console polls often.
    answer._has_been_logged = True  # type: ignore[attr-defined]
    return answer


def unknown_route(request: HttpRequest) -> HttpResponse:
    """404 in JSON, or 400 for what is not offered; 401 first under ``/v1``: probing reveals little.

    Under ``/api/`` are the addresses of the vendor's other services, which are no secret.
    """
    if request.path_info.startswith(OTHER_SERVICES):
        return to_json_response(NotFound(OTHER_SERVICE))
    authenticate(request)
    # Not raised, which would take longer than all the rest.
    return to_json_response(NotFound("This console has no such API route."))


def bad_request(request: HttpRequest, exception: Exception) -> HttpResponse:
    """400, or 413 if Django found the body too large."""
    if isinstance(exception, RequestDataTooBig):
        return to_response(request, PayloadTooLarge(LARGEST_BODY))
    if isinstance(exception, DisallowedHost):
        return to_json_response(
            InvalidInput(
                "This console does not answer to that host name. Its operator can allow it with "
                "ORKESTR_ALLOWED_HOSTS, or set ORKESTR_PUBLIC_URL."
            )
        )
    return to_response(request, InvalidInput())


def csrf_failure(request: HttpRequest, reason: str = "") -> HttpResponse:
    """403 for a form that was not sent from one of our pages; with the fix, not ``reason``."""
    return to_response(
        request,
        Forbidden(
            "This form expired, or wasn't sent from this console. Go back, reload "
            "the page and send it again; cookies must be allowed.",
            code="csrf_failed",
        ),
    )


def forbidden(request: HttpRequest, exception: Exception) -> HttpResponse:
    """403."""
    return to_response(request, Forbidden())


def not_found(request: HttpRequest, exception: Exception) -> HttpResponse:
    """404."""
    return to_response(request, NotFound())


def server_error(request: HttpRequest) -> HttpResponse:
    """500, with the request id to quote and without the traceback.

    Or 503, if a middleware could not reach the database. Django calls this while it handles the
    exception.
    """
    if (database_error := unavailable(sys.exception())) is not None:
        return to_response(request, database_error)
    error = Internal(extra={"request_id": getattr(request, "request_id", None)})
    return to_json_response(error) if is_api(request) else to_console_response(None, error)
