"""The error tree as components: one schema, and a response for each status."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from http import HTTPStatus
from typing import Any

from orkestr_console.core.errors import (
    STATUS_OF,
    DatabaseUnavailable,
    DomainError,
    Forbidden,
    HostUnavailable,
    InsufficientScope,
    Internal,
    InvalidInput,
    NotFound,
    PayloadTooLarge,
    RateLimited,
    Unauthenticated,
    UnsupportedMediaType,
)
from orkestr_console.http.describing import JSON
from orkestr_console.http.headers import REQUEST_ID_HEADER
from orkestr_console.openapi.calls import Call
from orkestr_console.openapi.schemas import prose

# The errors of every call, of those with a token, of those with a body, and of those about a thing.
ALWAYS = (InvalidInput, Internal, DatabaseUnavailable)
WITH_TOKEN = (Unauthenticated, Forbidden, InsufficientScope, RateLimited, HostUnavailable)
WITH_BODY = (PayloadTooLarge, UnsupportedMediaType)
WITH_SUBJECT = (NotFound,)
HEADERS: Mapping[HTTPStatus, Mapping[str, str]] = {
    HTTPStatus.UNAUTHORIZED: {"WWW-Authenticate": "How to authenticate (RFC 6750)."},
    HTTPStatus.TOO_MANY_REQUESTS: {"Retry-After": "Seconds until it is worth trying again."},
    HTTPStatus.SERVICE_UNAVAILABLE: {"Retry-After": "Seconds until it is worth trying again."},
    HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE: {"Content-Range": "How large the file is."},
}
SCHEMA = {
    "type": "object",
    "description": "Why a call was refused, or failed. Some codes have further members.",
    "required": ["detail", "code"],
    "properties": {
        "detail": {"type": "string", "description": "A sentence for a person: what to do."},
        "code": {
            "type": "string",
            "description": "For programs. More specific codes than these can follow.",
            "examples": sorted(STATUS_OF),
        },
        "fields": {
            "type": "object",
            "additionalProperties": {"type": "string"},
            "description": "A sentence for each field that is not valid.",
        },
        "retry_after": {
            "type": "integer",
            "description": "Seconds until it is worth trying again, as in `Retry-After`.",
        },
        "request_id": {"type": "string", "description": "What to quote to the operator."},
    },
}


def tree(error: type[DomainError] = DomainError) -> Iterator[type[DomainError]]:
    """Every error, as in the tree of :mod:`orkestr_console.core.errors`."""
    for each in error.__subclasses__():
        if each.__module__ == DomainError.__module__:
            yield each
            yield from tree(each)


def status_of(error: type[DomainError]) -> HTTPStatus:
    """The status of an error's responses."""
    return STATUS_OF[error.default_code]


def component(status: HTTPStatus) -> str:
    """The name of a status's response, such as ``NotFound``."""
    return "".join(word.capitalize() for word in status.name.split("_"))


def responses() -> dict[str, Any]:
    """The response of each status, with its codes as examples."""
    found: dict[HTTPStatus, dict[str, Any]] = {}
    for error in tree():
        found.setdefault(status_of(error), {}).setdefault(error.default_code, error)
    return {component(status): response(status, errors) for status, errors in found.items()}


def response(status: HTTPStatus, errors: Mapping[str, type[DomainError]]) -> dict[str, Any]:
    """One of them."""
    about = [
        f"`{code}`: {prose((error.__doc__ or '').split('\n\n')[0])}"
        for code, error in errors.items()
    ]
    headers = {REQUEST_ID_HEADER: {"$ref": "#/components/headers/RequestId"}}
    for name, description in HEADERS.get(status, {}).items():
        headers[name] = {"description": description, "schema": {"type": "string"}}  # type: ignore[dict-item]
    return {
        "description": "\n\n".join(about),
        "headers": headers,
        "content": {
            JSON: {
                "schema": {"$ref": "#/components/schemas/Error"},
                "examples": {code: example(error) for code, error in errors.items()},
            }
        },
    }


def example(error: type[DomainError]) -> dict[str, Any]:
    """What one looks like."""
    known = error.default_detail != DomainError.default_detail
    detail = error.default_detail if known else (error.__doc__ or "").split("\n\n")[0].split(":")[0]
    return {"value": {"detail": prose(detail), "code": error.default_code}}


def of_call(call: Call, more: Iterable[type[DomainError]], *, has_body: bool) -> dict[str, Any]:
    """References to the responses of the errors that a call can have."""
    errors = [*ALWAYS, *more]
    errors += WITH_TOKEN if call.scope else ()
    errors += WITH_BODY if has_body else ()
    errors += WITH_SUBJECT if call.scope and call.parameters else ()
    statuses = sorted({status_of(error) for error in errors})
    return {
        str(int(status)): {"$ref": f"#/components/responses/{component(status)}"}
        for status in statuses
    }
