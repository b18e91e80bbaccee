"""Parts of the public API that this server does not offer.

Clients take a 404 for a sandbox that is gone. So what is merely not offered answers ``unsupported``
instead, or ``interpreter_unavailable``, for which the official SDK has an exception. A route that
an app has comes first; this is asked about the others.
"""

from __future__ import annotations

import re

from orkestr_console.core.errors import DomainError, NotFound, Unsupported

PREFIX = "/v1/sandboxes/[^/]+"
INTERPRETER = re.compile(rf"{PREFIX}/code(?:/contexts(?:/[^/]+(?:/restart)?)?)?")


def missing_route(path: str) -> DomainError:
    """The error for an address that no app has."""
    if INTERPRETER.fullmatch(path):
        return Unsupported(
            "This server has no code interpreter; run the code with a command instead.",
            code="interpreter_unavailable",
        )
    return NotFound("This console has no such API route.")
