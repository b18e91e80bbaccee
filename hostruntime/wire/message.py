"""The base of what goes over the agent's socket, and how it becomes JSON and back."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError


class Message:
    """Base of every request and answer.

    No value of another type than its field's and no number that is none; a field that is not known
    is left out: the other side may be newer.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(
        strict=True, allow_inf_nan=False, extra="ignore"
    )


class MalformedError(ValueError):
    """JSON that is not the message it should be; its text is one sentence that says why."""


_adapters: dict[type[Message], TypeAdapter[Any]] = {}


def _adapter(kind: type[Message]) -> TypeAdapter[Any]:
    if kind not in _adapters:
        _adapters[kind] = TypeAdapter(kind)
    return _adapters[kind]


def encode(message: Message, *, brief: bool = False) -> bytes:
    """A message as JSON; ``brief`` leaves out what has its default."""
    return _adapter(type(message)).dump_json(message, exclude_defaults=brief)


def decode[M: Message](kind: type[M], data: bytes | str) -> M:
    """The message of a kind from its JSON.  Raises MalformedError."""
    try:
        message: M = _adapter(kind).validate_json(data)
    except ValidationError as error:
        raise MalformedError(_first_error(error)) from error
    return message


def from_fields[M: Message](kind: type[M], fields: object) -> M:
    """The message of a kind from an object that others wrote, such as a line of a log.

    A number may be written as text there.  Raises MalformedError.
    """
    try:
        # Strict, it would take nothing but the dataclass itself.
        message: M = _adapter(kind).validate_python(fields, strict=False)
    except ValidationError as error:
        raise MalformedError(_first_error(error)) from error
    return message


def _first_error(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    location = ".".join(str(part) for part in first["loc"])
    return f"{location}: {first['msg']}." if location else f"{first['msg']}."
