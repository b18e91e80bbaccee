"""What a call takes and answers, said above its view::

    @describe("List sandboxes", parameters=(STATUS, *PAGING), answer=SandboxList)
    @api(scope=READ)
    def list_sandboxes(request: ApiRequest) -> HttpResponse: ...

The OpenAPI document (:mod:`orkestr_console.openapi`) is made from it, and a query string may hold
only what it names: a parameter with a typing error in it is refused, and not ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from django.http import HttpRequest
from pydantic import BaseModel, Field

from orkestr_console.core.errors import DomainError, InvalidInput
from orkestr_console.http.paging import DEFAULT_LIMIT, MAX_LIMIT

# Where a view has its description.
DESCRIPTION = "orkestr_operation"
JSON, TEXT, EVENTS, LINES, BYTES = (
    "application/json",
    "text/plain",
    "text/event-stream",
    "application/x-ndjson",
    "application/octet-stream",
)

type Schema = Mapping[str, Any]


@dataclass(frozen=True)
class Parameter:
    """A parameter of the query string, or of the header; ``schema`` is JSON Schema's.

    One whose name ends in ``[]`` stands for any number of ``name[key]=value``; no key is blank.
    """

    name: str
    schema: Schema
    description: str
    required: bool = False
    where: str = "query"

    def covers(self, name: str) -> bool:
        """Whether a query string's ``name`` is this parameter."""
        if self.name.endswith("[]"):
            return name.startswith(self.name[:-1]) and name.endswith("]") and name != self.name
        return name == self.name


@dataclass(frozen=True)
class Operation:
    """A call. ``answer`` is a TypedDict (None without a body) and ``status`` its status.

    ``also`` has what the same call answers in other media types: the schema of a whole body, or
    for a stream the TypedDict of one event or line. ``errors`` are those that not every call has.
    ``example`` is a body that is valid; ``reads`` and ``writes`` the media type of other bodies.
    """

    summary: str
    notes: str = ""
    body: type[BaseModel] | None = None
    example: Mapping[str, Any] | None = None
    parameters: tuple[Parameter, ...] = ()
    answer: Any = None
    status: int = 200
    also: Mapping[str, Any] = field(default_factory=dict)
    statuses: Mapping[int, str] = field(default_factory=dict)
    errors: tuple[type[DomainError], ...] = ()
    reads: str = JSON
    extension: bool = False


def describe(summary: str, **description: Any) -> Callable[[Any], Any]:
    """Describe a view; see :class:`Operation`."""
    operation = Operation(summary, **description)

    def decorate[V](view: V) -> V:
        setattr(view, DESCRIPTION, operation)
        return view

    return decorate


def operation_of(view: object) -> Operation | None:
    """The description of a view, if it has one."""
    found: Operation | None = getattr(view, DESCRIPTION, None)
    return found


def require_known_parameters(view: object, request: HttpRequest) -> None:
    """Raise ``InvalidInput`` for a parameter that the call doesn't have, or has two values for."""
    operation = operation_of(view)
    if operation is None or not request.META.get("QUERY_STRING"):
        return
    known = [each for each in operation.parameters if each.where == "query"]
    for name, values in request.GET.lists():
        shown = name if len(name) <= 64 else f"{name[:64]}…"
        if not any(each.covers(name) for each in known):
            names = ", ".join(each.name for each in known) or "none"
            sentence = "is not a parameter of this call."
            raise InvalidInput(f"{shown}: {sentence} It takes {names}.", fields={shown: sentence})
        if len(set(values)) > 1:
            sentence = "is given with two values; send one."
            raise InvalidInput(f"{shown}: {sentence}", fields={shown: sentence})


def one_of(values: Any) -> Any:
    """Annotates a text that is one of a model's choices."""
    return Field(json_schema_extra={"enum": list(values)})


def number(least: int, most: int, default: int | None = None) -> Schema:
    """The schema of a whole number."""
    bounds = {"type": "integer", "minimum": least, "maximum": most}
    return bounds if default is None else {**bounds, "default": default}


FLAG: Schema = {"type": "string", "enum": ["true", "false"], "default": "false"}
LIMIT = Parameter(
    "limit",
    {"type": "integer", "minimum": 1, "maximum": 999_999, "default": DEFAULT_LIMIT},
    f"How many to list; more than {MAX_LIMIT} is taken as {MAX_LIMIT}.",
)
CURSOR = Parameter("cursor", {"type": "string"}, "`next_cursor` of the page before.")
PAGING = (LIMIT, CURSOR)


def read_flag(request: HttpRequest, name: str) -> bool:
    """A ``true`` or ``false`` of the query string. Raises ``InvalidInput`` for anything else."""
    text = request.GET.get(name) or "false"
    if text not in FLAG["enum"]:
        sentence = "must be 'true' or 'false'."
        raise InvalidInput(f"{name}: {sentence}", fields={name: sentence})
    return text == "true"
