"""Variables that a template, a sandbox or a command is given, and how a person types them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated

from pydantic import AfterValidator

from orkestr_console.core.errors import InvalidInput
from orkestr_console.core.text import STEERING, place

LARGEST_ENVIRONMENT = 64 * 1024
# POSIX.1-2017, 8.1: what a shell can name.
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


def usable_environment(env: dict[str, str]) -> dict[str, str]:
    """Variables that a process can be given."""
    for name, value in env.items():
        if not _VARIABLE.fullmatch(name):
            raise ValueError(
                f"{name!r} is not a valid variable name: use letters, digits and '_', and don't "
                "start with a digit."
            )
        if (at := value.find("\0")) >= 0:
            where = place(value, at)
            raise ValueError(f"{name} must not contain NUL characters; take out \\0, {where}.")
    if sum(len(name) + len(value.encode()) for name, value in env.items()) > LARGEST_ENVIRONMENT:
        raise ValueError(f"is larger than {LARGEST_ENVIRONMENT:,} bytes altogether.")
    return env


def typed_environment(text: str) -> dict[str, str]:
    """``NAME=value`` lines. Raises ``InvalidInput`` naming the line that is none."""
    found: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if not equals:
            sentence = f"Line {number} is not of the form NAME=value."
            raise InvalidInput(sentence, fields={"env": sentence})
        found[name.strip()] = value
    return found


def as_typed(env: Mapping[str, str]) -> str:
    """The lines that say ``env``, but for values that are no line (:func:`not_typed`)."""
    return "\n".join(f"{name}={value}" for name, value in env.items() if is_line(value))


def not_typed(env: Mapping[str, str]) -> tuple[str, ...]:
    """The names of variables whose values a line cannot say, or a person not see."""
    return tuple(name for name, value in env.items() if not is_line(value))


def is_line(value: str) -> bool:
    """Whether a line can say a value, and a person who reads it sees all of it."""
    return "\n" not in value and not STEERING.search(value)


Environment = Annotated[dict[str, str], AfterValidator(usable_environment)]
