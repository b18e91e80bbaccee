"""The base class of messages on the agent's socket, and their conversion to and from JSON."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError


class Message:
    """Base of every request and response.

    Values must have exactly their field's type, without NaN and infinity; unknown fields are
    ignored, as the other side may be newer.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(
        strict=True, allow_inf_nan=False, extra="ignore"
    )


class MalformedError(ValueError):
    """JSON that is not a valid message; the text is one sentence that says why."""


_adapters: dict[type[Message], TypeAdapter[Any]] = {}


def _adapter(kind: type[Message]) -> TypeAdapter[Any]:
    if kind not in _adapters:
        _adapters[kind] = TypeAdapter(kind)
    return _adapters[kind]


def encode(message: Message, *, brief: bool = False) -> bytes:
    """A message as JSON; ``brief`` leaves out fields with their default."""
    return _adapter(type(message)).dump_json(message, exclude_defaults=brief)


def decode[M: Message](kind: type[M], data: bytes | str) -> M:
    """Parse a message of a kind from JSON.  Raises MalformedError."""
    try:
        message: M = _adapter(kind).validate_json(data)
    except ValidationError as error:
        raise MalformedError(_first_error(error)) from error
    return message


def from_fields[M: Message](kind: type[M], fields: object) -> M:
    """Parse a message of a kind from an object of another origin, such as a line of a log.

    Numbers may be text there.  Raises MalformedError.
    """
    try:
        # In strict mode it would accept only an instance of the dataclass.
        message: M = _adapter(kind).validate_python(fields, strict=False)
    except ValidationError as error:
        raise MalformedError(_first_error(error)) from error
    return message


def _first_error(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    location = ".".join(str(part) for part in first["loc"])
    return f"{location}: {first['msg']}." if location else f"{first['msg']}."
