"""The OpenAPI document, put together (OpenAPI Specification 3.1.1)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from hashlib import sha256
from http import HTTPStatus
from typing import Any

from orkestr_console.accounts.actor import READ, WRITE
from orkestr_console.core.errors import Conflict, DomainError
from orkestr_console.http import idempotency
from orkestr_console.http.describing import EVENTS, JSON, LINES, Operation, Parameter
from orkestr_console.http.headers import REQUEST_ID_HEADER
from orkestr_console.openapi import refusals
from orkestr_console.openapi.calls import GROUPS, Call, calls
from orkestr_console.openapi.samples import samples
from orkestr_console.openapi.schemas import schemas

STREAMS = {EVENTS: "Server-sent events, each one JSON object.", LINES: "JSON objects, one a line."}
TITLE = "Orkestr Console"
VERSION = "1.0"
ABOUT = (
    "Sandboxes and their templates. Send an API token in `Authorization: Bearer ork_…`. Times are "
    "in UTC, lists come newest first, and every answer has an `X-Request-Id`. Another team's "
    "things are answered as if they did not exist. GET can be sent as HEAD."
)
TOKEN = "token"  # noqa: S105 - the name of the scheme
ABOUT_TOKEN = f"An API token with the scope `{READ}` or `{WRITE}`, as each call says."
ABOUT_KEY = (
    "Sent again with the same key within a day, the call is made once, and answered with "
    "`Idempotent-Replayed: true` and what it answered first."
)


@cache
def encoded() -> tuple[bytes, str]:
    """The document as it is sent, and its entity tag (RFC 9110, section 8.8.3)."""
    content = json.dumps(document(), ensure_ascii=False, separators=(",", ":")).encode()
    return content, f'"{sha256(content).hexdigest()[:32]}"'


@cache
def document() -> dict[str, Any]:
    """All of it. What is not described is left out: a test fails for it (:func:`missing`)."""
    described = [(call, call.operation) for call in calls() if call.operation is not None]
    shapes = Shapes(operation for _, operation in described)
    paths: dict[str, Any] = {}
    for call, operation in described:
        paths.setdefault(call.path, {})[call.method.lower()] = entry(call, operation, shapes)
    used = {call.group.name for call, _ in described if call.group}
    return {
        "openapi": "3.1.1",
        "info": {"title": TITLE, "version": VERSION, "description": ABOUT},
        "servers": [{"url": "/", "description": "This server."}],
        "tags": [
            {"name": each.name, "description": each.about} for each in GROUPS if each.name in used
        ],
        "paths": paths,
        "components": {
            "schemas": {**dict(sorted(shapes.components.items())), "Error": refusals.SCHEMA},
            "responses": refusals.responses(),
            "headers": {
                "RequestId": {
                    "description": "The request's id: the client's own, or a new one.",
                    "schema": {"type": "string"},
                }
            },
            "securitySchemes": {
                TOKEN: {"type": "http", "scheme": "bearer", "description": ABOUT_TOKEN}
            },
        },
    }


def missing() -> list[str]:
    """What to describe, and where, one sentence each."""
    found = []
    for call in calls():
        where = f"{call.view.__module__}.{call.name}"
        if call.operation is None:
            found.append(
                f"{call.method} {call.path} is not described: put @describe(…) of "
                f"orkestr_console.http.describing above {where}"
            )
        if call.group is None:
            found.append(
                f"{call.method} {call.path} belongs to no group: add one to GROUPS in "
                "orkestr_console.openapi.calls"
            )
    return found


class Shapes:
    """The schemas of all operations, made together, so that they share components."""

    def __init__(self, operations: Iterable[Operation]) -> None:
        types = []
        for each in operations:
            types += [each.body] if each.body else []
            types += [each.answer] if each.answer else []
            types += [shape for shape in each.also.values() if not isinstance(shape, Mapping)]
        self._types = types
        self._schemas, self.components = schemas(types)

    def of(self, shape: Any) -> dict[str, Any]:
        """The schema of a type, or a schema as it is."""
        if isinstance(shape, Mapping):
            return dict(shape)
        return self._schemas[self._types.index(shape)]


def entry(call: Call, operation: Operation, shapes: Shapes) -> dict[str, Any]:
    """One operation of the document."""
    made: dict[str, Any] = {
        "operationId": call.name,
        "summary": operation.summary,
        "tags": [call.group.name] if call.group else [],
        "security": [{TOKEN: [call.scope]}] if call.scope else [],
        "responses": {
            **refusals.of_call(call, errors(call, operation), has_body=operation.body is not None),
            **successes(call, operation, shapes),
        },
        "x-codeSamples": samples(call, operation),
    }
    if operation.notes:
        made["description"] = operation.notes
    if operation.extension:
        made["x-extension"] = True
    if listed := parameters(call, operation):
        made["parameters"] = listed
    if operation.body is not None:
        media: dict[str, Any] = {"schema": shapes.of(operation.body)}
        if operation.example is not None:
            media["example"] = dict(operation.example)
        made["requestBody"] = {"required": True, "content": {JSON: media}}
    elif operation.reads != JSON:
        made["requestBody"] = {"required": True, "content": {operation.reads: {}}}
    return made


def creates(call: Call) -> bool:
    """Whether the call takes an idempotency key."""
    return call.method == "POST" and idempotency.CREATES.fullmatch(call.path) is not None


def errors(call: Call, operation: Operation) -> tuple[type[DomainError], ...]:
    """The errors that it can have besides those that others have as well."""
    return (*operation.errors, Conflict) if creates(call) else operation.errors


def parameters(call: Call, operation: Operation) -> list[dict[str, Any]]:
    """Those of the address, then of the query string and the header."""
    found: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in call.parameters
    ]
    found += [parameter(each) for each in operation.parameters]
    if creates(call):
        schema = {"type": "string", "pattern": f"^{idempotency.KEY.pattern}$"}
        key = Parameter(idempotency.HEADER, schema, ABOUT_KEY, where="header")
        found.append(parameter(key))
    return found


def parameter(each: Parameter) -> dict[str, Any]:
    """One of them; ``metadata[]`` is an object of which each member is a parameter of its own."""
    made: dict[str, Any] = {
        "name": each.name.removesuffix("[]"),
        "in": each.where,
        "description": each.description,
        "schema": dict(each.schema),
    }
    if each.required:
        made["required"] = True
    elif each.where == "query" and ("enum" in each.schema or each.schema["type"] == "integer"):
        # A blank one counts as left out.
        made["allowEmptyValue"] = True
    if each.name.endswith("[]"):
        made |= {"style": "deepObject", "explode": True}
    return made


def successes(call: Call, operation: Operation, shapes: Shapes) -> dict[str, Any]:
    """The answers to a call that was made."""
    content: dict[str, Any] = {}
    if operation.answer is not None:
        content[JSON] = {"schema": shapes.of(operation.answer)}
    for media, shape in operation.also.items():
        if media in STREAMS:
            # 3.1 has nothing for the items of a stream, of which 3.2 has the itemSchema.
            content[media] = {
                "schema": {"description": STREAMS[media]},
                "x-itemSchema": shapes.of(shape),
            }
        else:
            content[media] = {"schema": shapes.of(shape)} if shape else {}
    headers: dict[str, Any] = {REQUEST_ID_HEADER: {"$ref": "#/components/headers/RequestId"}}
    if creates(call):
        headers[idempotency.REPLAYED] = {
            "description": "`true` if this answers a call that was made before.",
            "schema": {"type": "string"},
        }
    made: dict[str, Any] = {"description": HTTPStatus(operation.status).phrase, "headers": headers}
    if content:
        made["content"] = content
    others = {
        str(status): {**made, "description": about} for status, about in operation.statuses.items()
    }
    return {str(operation.status): made, **others}
