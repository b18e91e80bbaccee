"""Pydantic's errors as one sentence that names the field.

REST (a JSON body) and the console (a form) both validate through here, so that the spec alone
defines what is valid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from orkestr_console.core.errors import InvalidInput

SENTENCES: Mapping[str, str] = {
    "missing": "is required",
    "extra_forbidden": "is not a known field",
    "string_type": "must be a string",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "too_short": "must have at least {min_length} entries",
    "too_long": "must have at most {max_length} entries",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be one of {expected}",
    "enum": "must be one of {expected}",
    "finite_number": "must be a finite number",
    "none_required": "must be null",
}


def parse_spec[S: BaseModel](spec: type[S], data: Any) -> S:
    """``data`` as a ``spec``. Raises ``InvalidInput`` with a sentence per invalid field."""
    try:
        return spec.model_validate(data)
    except ValidationError as error:
        raise invalid_input(error) from None


def invalid_input(error: ValidationError) -> InvalidInput:
    """The domain error for pydantic's errors; the first one is the message."""
    errors = error.errors(include_url=False, include_input=False)
    fields: dict[str, str] = {}
    for finding in errors:
        fields.setdefault(field_path(finding["loc"]), sentence(finding))
    first = next(iter(fields))
    detail = fields[first] if first == "" else f"{first}: {fields[first]}"
    return InvalidInput(detail, fields=fields)


def field_path(location: tuple[int | str, ...]) -> str:
    """``("recipe", 2)`` as ``recipe[2]``; blank for the entire body."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def sentence(finding: ErrorDetails) -> str:
    """One error as a sentence."""
    context: dict[str, Any] = finding.get("ctx", {})
    if finding["type"] in {"value_error", "assertion_error"}:
        # Our own validators' messages, without pydantic's "Value error, ".
        return str(context["error"])
    words = SENTENCES.get(finding["type"])
    return f"{words.format(**context)}." if words else f"{finding['msg']}."
