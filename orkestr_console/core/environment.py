"""Environment variables of templates, sandboxes and commands, and their text form."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated

from pydantic import AfterValidator, Field

from orkestr_console.core.errors import InvalidInput
from orkestr_console.core.text import INVISIBLE, position_text

MAX_ENVIRONMENT_BYTES = 64 * 1024
# POSIX.1-2017, 8.1: a shell's variable names.
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


def usable_environment(env: dict[str, str]) -> dict[str, str]:
    """Variables that can be passed to a process. Raises ``ValueError``."""
    for name, value in env.items():
        if not _VARIABLE.fullmatch(name):
            raise ValueError(
                f"{name!r} is not a valid variable name: use letters, digits and '_', and don't "
                "start with a digit."
            )
        if (at := value.find("\0")) >= 0:
            where = position_text(value, at)
            raise ValueError(f"{name} must not contain NUL characters; take out \\0, {where}.")
    if sum(len(name) + len(value.encode()) for name, value in env.items()) > MAX_ENVIRONMENT_BYTES:
        raise ValueError(f"is larger than {MAX_ENVIRONMENT_BYTES:,} bytes altogether.")
    return env


def parse_environment(text: str) -> dict[str, str]:
    """Parse ``NAME=value`` lines. Raises ``InvalidInput`` with the number of an invalid line."""
    env: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if not equals:
            sentence = f"Line {number} is not of the form NAME=value."
            raise InvalidInput(sentence, fields={"env": sentence})
        env[name.strip()] = value
    return env


def format_environment(env: Mapping[str, str]) -> str:
    """``NAME=value`` lines, without values that don't fit (:func:`unformattable_names`)."""
    return "\n".join(f"{name}={value}" for name, value in env.items() if fits_on_line(value))


def unformattable_names(env: Mapping[str, str]) -> tuple[str, ...]:
    """The names of variables whose values have line feeds or invisible characters."""
    return tuple(name for name, value in env.items() if not fits_on_line(value))


def fits_on_line(value: str) -> bool:
    """Whether a value fits on a line, without invisible characters."""
    return "\n" not in value and not INVISIBLE.search(value)


Environment = Annotated[
    dict[str, str],
    AfterValidator(usable_environment),
    Field(json_schema_extra={"propertyNames": {"pattern": f"^{_VARIABLE.pattern}$"}}),
]
