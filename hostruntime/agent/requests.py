"""Reading the agent's requests: wire messages, path and query parameters."""

from __future__ import annotations

import math
from contextlib import suppress

from starlette.requests import Request

from hostruntime.errors import InvalidRequest
from hostruntime.wire.message import MalformedError, Message, decode


async def read_message[M: Message](request: Request, kind: type[M]) -> M:
    """The request's JSON body as a message.  Raises InvalidRequest with one sentence."""
    try:
        return decode(kind, await request.body())
    except MalformedError as error:
        raise InvalidRequest(str(error)) from error


def path_parameter(request: Request, name: str = "id") -> str:
    """A parameter of the path."""
    return str(request.path_params[name])


def query_parameter(request: Request, name: str) -> str:
    """A required query parameter.  Raises InvalidRequest."""
    value = request.query_params.get(name)
    if not value:
        raise InvalidRequest(f"The parameter {name} is missing.")
    return value


def query_number(request: Request, name: str, default: float) -> float:
    """A numeric query parameter.  Raises InvalidRequest."""
    text = request.query_params.get(name)
    if text is None:
        return default
    with suppress(ValueError):
        # "inf" and "nan" are numbers for float().
        if math.isfinite(number := float(text)):
            return number
    raise InvalidRequest(f"The parameter {name} must be a number, not {text[:80]!r}.")


def query_integer(request: Request, name: str) -> int | None:
    """A query parameter that is a number of bytes; None without one.  Raises InvalidRequest."""
    text = request.query_params.get(name)
    if text is not None and not (text.isascii() and text.isdigit()):
        raise InvalidRequest(f"The parameter {name} must be a whole number, not {text!r}.")
    return None if text is None else int(text)


def query_flag(request: Request, name: str, *, default: bool = False) -> bool:
    """A boolean query parameter."""
    return request.query_params.get(name, "true" if default else "false") == "true"
