"""The domain errors, their codes and statuses, and each surface's form of them.

::

    DomainError                      code, detail, HTTP status
     ├─ InvalidInput                 400 invalid_request       (+ ``fields``: field → sentence)
     │   ├─ MalformedJson            400 malformed_json        the body is no usable JSON
     │   └─ Unsupported              400 unsupported           known, but not in this release
     ├─ Unauthenticated              401 unauthenticated       no token, or not a good one
     ├─ Forbidden                    403 forbidden
     │   ├─ InsufficientScope        403 insufficient_scope    the token lacks a scope
     │   └─ PlanLimit                403 plan_limit            the team's plan does not cover it
     ├─ NotFound                     404 not_found             absent, or somebody else's
     ├─ MethodNotAllowed             405 method_not_allowed    (+ ``Allow``)
     ├─ Conflict                     409 conflict              not in the right state
     │   └─ Asleep                   409 conflict              paused, but can be woken
     ├─ LengthRequired               411 length_required
     ├─ PayloadTooLarge              413 payload_too_large
     ├─ RangeNotSatisfiable          416 range_not_satisfiable (+ ``Content-Range``)
     ├─ UnsupportedMediaType         415 unsupported_media_type
     ├─ RateLimited                  429 rate_limited          (+ ``Retry-After``)
     ├─ ExecTimeout                  408 exec_timeout          the command ran past its time
     ├─ ExecKilled                   409 exec_killed           (+ ``signal``)
     ├─ HostUnavailable              503 host_unavailable      (+ ``Retry-After``)
     ├─ DatabaseUnavailable          503 database_unavailable  (+ ``Retry-After``)
     ├─ FleetFull                    503 fleet_full_retry      (+ ``Retry-After``), nothing made
     └─ Internal                     500 internal_error        a bug of ours

A leaf module: it imports nothing of the project.  ``detail`` is one sentence for a person that
says what was wrong and what to do.  ``STATUS_OF`` is the only table of statuses; a code that an
error sets for itself (``Conflict(…, code="snapshot_cap_reached")``) keeps the status of its class.
"""
# ruff: noqa: N818 - the class names are the vocabulary of the contract, not "…Error"

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from http import HTTPStatus
from typing import Any, ClassVar

from django.http import HttpRequest, HttpResponse, JsonResponse
from django.middleware.csrf import get_token
from django.template.loader import render_to_string

STATUS_OF: Mapping[str, HTTPStatus] = {
    "invalid_request": HTTPStatus.BAD_REQUEST,
    "malformed_json": HTTPStatus.BAD_REQUEST,
    "unsupported": HTTPStatus.BAD_REQUEST,
    "unauthenticated": HTTPStatus.UNAUTHORIZED,
    "forbidden": HTTPStatus.FORBIDDEN,
    "insufficient_scope": HTTPStatus.FORBIDDEN,
    "plan_limit": HTTPStatus.FORBIDDEN,
    "token_restricted": HTTPStatus.FORBIDDEN,
    "network_policy_blocked": HTTPStatus.FORBIDDEN,
    "not_found": HTTPStatus.NOT_FOUND,
    "method_not_allowed": HTTPStatus.METHOD_NOT_ALLOWED,
    "exec_timeout": HTTPStatus.REQUEST_TIMEOUT,
    "conflict": HTTPStatus.CONFLICT,
    "exec_killed": HTTPStatus.CONFLICT,
    "length_required": HTTPStatus.LENGTH_REQUIRED,
    "range_not_satisfiable": HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
    "payload_too_large": HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    "unsupported_media_type": HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    "rate_limited": HTTPStatus.TOO_MANY_REQUESTS,
    "internal_error": HTTPStatus.INTERNAL_SERVER_ERROR,
    "host_unavailable": HTTPStatus.SERVICE_UNAVAILABLE,
    "database_unavailable": HTTPStatus.SERVICE_UNAVAILABLE,
    "fleet_full_retry": HTTPStatus.SERVICE_UNAVAILABLE,
}


# The addresses that programs call.
API_PREFIXES = ("/v1/", "/api/")
API_ROOTS = ("/v1", "/api")
# Fields that no page shows again, not even hidden.
PASSWORDS = {"password", "current", "code"}
TOKEN_FIELD = "csrfmiddlewaretoken"  # noqa: S105 - a name


class DomainError(Exception):
    """The base of all deliberate refusals.

    ``detail`` is a sentence for a person; ``fields`` maps a field of the request to its own
    sentence; ``retry_after`` is in seconds; ``code`` overrides the class's machine name;
    ``extra`` holds further JSON-safe members of the answer.
    """

    default_code: ClassVar[str] = "internal_error"
    default_detail: ClassVar[str] = "Something went wrong."

    def __init__(
        self,
        detail: str = "",
        *,
        code: str | None = None,
        fields: Mapping[str, str] | None = None,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.detail = detail or self.default_detail
        super().__init__(self.detail)
        self.code = code or self.default_code
        self.fields = dict(fields) if fields else None
        self.retry_after = retry_after
        self.headers = dict(headers or {})
        self.extra = dict(extra or {})

    @property
    def status(self) -> int:
        """The HTTP status, from the one table: by the error's own code, else by its class's."""
        return int(STATUS_OF.get(self.code) or STATUS_OF[self.default_code])

    def to_wire(self) -> dict[str, Any]:
        """The JSON object that clients get: ``{"detail", "code", …}``."""
        wire: dict[str, Any] = {"detail": self.detail, "code": self.code, **self.extra}
        if self.fields:
            wire["fields"] = self.fields
        if self.retry_after is not None:
            wire["retry_after"] = self.retry_after
        return wire

    def all_headers(self) -> dict[str, str]:
        """The response headers that belong to the error."""
        if self.retry_after is None:
            return self.headers
        return {**self.headers, "Retry-After": str(self.retry_after)}


class InvalidInput(DomainError):
    """The request is understood, but not valid."""

    default_code = "invalid_request"
    default_detail = "The request is not valid."


class MalformedJson(InvalidInput):
    """The body is not JSON, or ambiguous JSON."""

    default_code = "malformed_json"
    default_detail = "The body is not valid JSON."


class Unsupported(InvalidInput):
    """A part of the public API that this release lacks."""

    default_code = "unsupported"
    default_detail = "This console does not support that yet."


class Unauthenticated(DomainError):
    """The caller is unknown. Carries the challenge of RFC 6750."""

    default_code = "unauthenticated"
    default_detail = "Send your API token in the header 'Authorization: Bearer ork_…'."

    def __init__(self, detail: str = "", *, challenge: str = "Bearer") -> None:
        super().__init__(detail, headers={"WWW-Authenticate": challenge})


class Forbidden(DomainError):
    """The caller is known and may not do this."""

    default_code = "forbidden"
    default_detail = "You don't have permission to do this."


class InsufficientScope(Forbidden):
    """The token is valid but lacks the scope ``required``."""

    default_code = "insufficient_scope"

    def __init__(self, required: str) -> None:
        super().__init__(
            f"This API token lacks the scope '{required}'; use one that has it.",
            headers={"WWW-Authenticate": f'Bearer error="insufficient_scope", scope="{required}"'},
        )


class PlanLimit(Forbidden):
    """The team's plan does not cover it: with the limit, the usage and what to do."""

    default_code = "plan_limit"


class NotFound(DomainError):
    """It does not exist, or belongs to another team: the two must look the same."""

    default_code = "not_found"
    default_detail = "Page not found. Check the address."


class MethodNotAllowed(DomainError):
    """The route exists, but not with this method."""

    default_code = "method_not_allowed"

    def __init__(self, method: str, allowed: Sequence[str]) -> None:
        listed = ", ".join(allowed)
        super().__init__(
            f"{method} is not possible here; this address takes {listed}.",
            headers={"Allow": listed},
        )


class Conflict(DomainError):
    """It exists, but its state does not allow this."""

    default_code = "conflict"


class Asleep(Conflict):
    """It is paused, and wakes when it is used: whoever can wait awaits ``wake`` and calls again.

    Raised before anything has happened. Others answer it as the conflict that it is.
    """

    def __init__(
        self, detail: str, wake: Callable[[], Coroutine[Any, Any, None]], *, code: str | None = None
    ) -> None:
        super().__init__(detail, code=code)
        self.wake = wake


class LengthRequired(DomainError):
    """A body whose length the client has not said."""

    default_code = "length_required"
    default_detail = "Send the length of the body, in a Content-Length header."


class RangeNotSatisfiable(DomainError):
    """A file of ``size`` bytes has none of those that were asked for."""

    default_code = "range_not_satisfiable"

    def __init__(self, detail: str, size: int) -> None:
        super().__init__(detail, headers={"Content-Range": f"bytes */{size}"})
        self.size = size


class PayloadTooLarge(DomainError):
    """The body is larger than this call accepts."""

    default_code = "payload_too_large"

    def __init__(self, limit: int, detail: str = "") -> None:
        whole = f"The body is too large: this call takes at most {limit:,} bytes."
        super().__init__(detail or whole)


class UnsupportedMediaType(DomainError):
    """The body's declared content type is not what this call reads."""

    default_code = "unsupported_media_type"
    default_detail = "Send the body as JSON, with the header 'Content-Type: application/json'."


class RateLimited(DomainError):
    """Too many calls; the next one may succeed after ``retry_after`` seconds."""

    default_code = "rate_limited"

    def __init__(
        self, detail: str = "", *, retry_after: int = 1, extra: Mapping[str, Any] | None = None
    ) -> None:
        detail = detail or "Too many requests; slow down."
        super().__init__(detail, retry_after=retry_after, extra=extra)


class ExecTimeout(DomainError):
    """A command exceeded its time limit and was killed."""

    default_code = "exec_timeout"


class ExecKilled(DomainError):
    """A command was killed by signal number ``signal``."""

    default_code = "exec_killed"

    def __init__(self, detail: str = "", *, signal: int | None = None) -> None:
        super().__init__(detail or "The command was killed.", extra={"signal": signal})


class HostUnavailable(DomainError):
    """The host agent does not answer, or failed; retrying later may help."""

    default_code = "host_unavailable"
    default_detail = "The sandbox host isn't responding; try again in a moment."

    def __init__(self, detail: str = "", *, retry_after: int = 5) -> None:
        super().__init__(detail, retry_after=retry_after)


class DatabaseUnavailable(DomainError):
    """The database is restarting, down, or out of connections; retrying later helps."""

    default_code = "database_unavailable"
    default_detail = (
        "The console's database isn't responding: it is restarting or overloaded. Try again in a "
        "moment."
    )

    def __init__(self, detail: str = "", *, retry_after: int = 2) -> None:
        super().__init__(detail, retry_after=retry_after)


class FleetFull(DomainError):
    """No room for another container now. Nothing was created, so a retry is safe."""

    default_code = "fleet_full_retry"
    default_detail = "There is no room for another sandbox right now; try again in a moment."

    def __init__(self, detail: str = "", *, retry_after: int = 2) -> None:
        super().__init__(detail, retry_after=retry_after)


class Internal(DomainError):
    """A bug of ours. It reveals no more than that, and the request id to quote."""

    default_code = "internal_error"
    default_detail = "Something went wrong on our side. Quote the request id to your operator."


def to_json_response(error: DomainError) -> JsonResponse:
    """The REST response of an error."""
    return JsonResponse(error.to_wire(), status=error.status, headers=error.all_headers())


HEADINGS = {
    403: "You don't have access",
    404: "Page not found",
    409: "That isn't possible right now",
    503: "The sandbox host isn't responding",
}


def heading(error: DomainError) -> str:
    """The heading of an error's page."""
    if isinstance(error, DatabaseUnavailable):
        return "The console will be back in a moment"
    other = "Something went wrong" if error.status >= 500 else "That didn't work"
    return HEADINGS.get(error.status, other)


def to_console_response(request: HttpRequest | None, error: DomainError) -> HttpResponse:
    """How the console says it: the page ``errors/error.html`` with ``error`` and ``status``.

    Without ``request`` the page says nothing of the person or team, which a page about a broken
    database could not look up; that is how ``DatabaseUnavailable`` is told.
    """
    if isinstance(error, DatabaseUnavailable) and request is not None:
        return away(request, error)
    ref = error.extra.get("request_id") or getattr(request, "request_id", None)
    context = {"error": error, "status": error.status, "heading": heading(error), "ref": ref}
    page = render_to_string("errors/error.html", context, request)
    return HttpResponse(page, status=error.status, headers=error.all_headers())


def away(request: HttpRequest, error: DatabaseUnavailable) -> HttpResponse:
    """The same where the database is away: nothing that was sent is lost.

    The page can send a form again as it was. What a script asked for is a notice, and what the
    person typed stays where it is.
    """
    context: dict[str, Any] = {"error": error, "status": error.status, "again": None}
    context["heading"] = heading(error)
    if "HX-Request" in request.headers:
        page = render_to_string("errors/_away.html", context)
    else:
        context["ref"] = getattr(request, "request_id", None)
        context["again"] = {"address": request.get_full_path(), "method": request.method}
        if request.method == "POST":
            context["again"] |= {"token": get_token(request), "fields": sent(request)}
        page = render_to_string("errors/error.html", context)
    return HttpResponse(page, status=error.status, headers=error.all_headers())


def sent(request: HttpRequest) -> list[tuple[str, str]] | None:
    """The fields of a form to be sent again; None where a page should not repeat them."""
    if PASSWORDS & set(request.POST):
        return None
    named = [(name, values) for name, values in request.POST.lists() if name != TOKEN_FIELD]
    return [(name, str(value)) for name, values in named for value in values]


def to_mcp_text(error: DomainError) -> str:
    """The MCP form of an error: one line, ``code: detail``."""
    return f"{error.code}: {error.detail}"


def rpc_error(error: DomainError) -> dict[str, Any]:
    """The JSON-RPC 2.0 form of an error, for a request that has not been read (section 5.1)."""
    invalid_request = -32600
    said = {"code": invalid_request, "message": error.detail, "data": error.to_wire()}
    return {"jsonrpc": "2.0", "id": None, "error": said}


def is_api(request: HttpRequest) -> bool:
    """Whether a program calls, and so always gets JSON."""
    return is_api_path(request.path)


def is_api_path(path: str) -> bool:
    """Whether ``path`` is of REST or of the account calls."""
    return path.startswith(API_PREFIXES) or path in API_ROOTS


def to_response(request: HttpRequest, error: DomainError) -> HttpResponse:
    """The response in the form of the caller's surface."""
    return to_json_response(error) if is_api(request) else to_console_response(request, error)
