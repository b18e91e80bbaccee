"""Reading JSON bodies and writing JSON responses under ``/v1``.

The body must be unambiguous: UTF-8, no duplicate names, no NaN or Infinity, not nested too deeply,
and no text that PostgreSQL cannot store (NUL, a lone surrogate).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, NoReturn, overload

from django.conf import settings
from django.http import HttpRequest, HttpResponse, JsonResponse
from pydantic import BaseModel, Field, ValidationError

from orkestr_console.core.errors import (
    InvalidInput,
    MalformedJson,
    PayloadTooLarge,
    UnsupportedMediaType,
)
from orkestr_console.core.text import storage_problem
from orkestr_console.http.validation import invalid_input

MAX_DEPTH = 32
# What `timestamp` returns, in the schema of an answer.
Timestamp = Annotated[str, Field(json_schema_extra={"format": "date-time"})]


def read_json[S: BaseModel](
    request: HttpRequest, spec: type[S], *, max_bytes: int | None = None
) -> S:
    """The request's body as a ``spec``, a strict pydantic model.

    ``max_bytes`` limits the body (default ``settings.USUAL_BODY``). Raises
    ``UnsupportedMediaType`` (415), ``PayloadTooLarge`` (413), ``MalformedJson`` (400) or
    ``InvalidInput`` (400) naming the field.
    """
    body = read_body(request, max_bytes or settings.USUAL_BODY)
    if not isinstance(parse(body), dict):
        raise InvalidInput("The body must be a JSON object.")
    try:
        # From the text, not the objects: strict mode then still accepts types that JSON lacks.
        return spec.model_validate_json(body)
    except ValidationError as error:
        raise invalid_input(error) from None


def read_body(request: HttpRequest, max_bytes: int) -> bytes:
    """The raw JSON body. Raises ``UnsupportedMediaType`` or ``PayloadTooLarge``."""
    if request.content_type != "application/json":
        raise UnsupportedMediaType
    if int(request.META.get("CONTENT_LENGTH") or 0) > max_bytes:
        raise PayloadTooLarge(max_bytes)
    body = request.body
    if len(body) > max_bytes:
        raise PayloadTooLarge(max_bytes)
    return body


def parse(body: bytes) -> Any:
    """The JSON value in ``body``. Raises ``MalformedJson`` or, for NUL, ``InvalidInput``."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedJson(f"The body is not UTF-8: byte {error.start} is wrong.") from None
    if not text.strip():
        raise MalformedJson("The body is empty; send a JSON object.")
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_reject_constant)
    except json.JSONDecodeError as error:
        raise MalformedJson(
            f"The body is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        ) from None
    except RecursionError:
        raise MalformedJson(f"The body is nested more than {MAX_DEPTH} levels deep.") from None
    except ValueError:
        # A number with thousands of digits.
        raise MalformedJson("The body holds a number that is too long.") from None
    reject_unusable(value, "", MAX_DEPTH)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in names if names.count(name) > 1)
        raise MalformedJson(f"The field {duplicate!r} is given twice.")
    return fields


def _reject_constant(name: str) -> NoReturn:
    raise MalformedJson(f"{name} is not a JSON number.")


def reject_unusable(value: Any, path: str, depth: int) -> None:
    """Refuse nesting deeper than ``depth``, numbers beyond a double, and unstorable text.

    ``path`` names ``value`` in the error: ``MalformedJson`` or ``InvalidInput``.
    """
    if depth < 0:
        raise MalformedJson(f"The body is nested more than {MAX_DEPTH} levels deep.")
    if isinstance(value, str):
        if problem := storage_problem(value):
            raise InvalidInput(f"{path or 'The body'}: {problem}", fields={path: problem})
    elif isinstance(value, dict):
        for name, member in value.items():
            if problem := storage_problem(name):
                raise InvalidInput(f"A field's name {problem}")
            reject_unusable(member, f"{path}.{name}" if path else name, depth - 1)
    elif isinstance(value, list):
        for index, member in enumerate(value):
            reject_unusable(member, f"{path}[{index}]", depth - 1)
    elif isinstance(value, float) and value in {float("inf"), float("-inf")}:
        raise MalformedJson(f"{path or 'The body'}: the number is too large.")


def json_response(
    data: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
) -> JsonResponse:
    """A JSON object as the response."""
    return JsonResponse(dict(data), status=status, headers=dict(headers or {}))


def no_content() -> HttpResponse:
    """204, with no body and no content type."""
    response = HttpResponse(status=204)
    del response.headers["Content-Type"]
    return response


@overload
def timestamp(moment: datetime) -> str: ...


@overload
def timestamp(moment: datetime | None) -> str | None: ...


def timestamp(moment: datetime | None) -> str | None:
    """ISO 8601 in UTC with milliseconds and ``Z``; None stays None."""
    if moment is None:
        return None
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
