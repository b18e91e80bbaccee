"""Who is calling, on whose behalf, through which surface, and with which scopes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from orkestr_console.accounts.models import ApiToken, Team, User
from orkestr_console.errors import InsufficientScope

type Surface = Literal["console", "rest", "mcp", "system"]

READ = "sandboxes:read"
WRITE = "sandboxes:write"
EVERYTHING = "*"
SCOPES = (READ, WRITE, EVERYTHING)


@dataclass(frozen=True, slots=True)
class Actor:
    """The caller of a service.

    ``address`` is the network address it called from, where there is one. ``scopes`` is what the
    token carries; a person in the console and the system itself have ``*``.
    """

    team: Team
    user: User | None
    token: ApiToken | None
    surface: Surface
    address: str | None = None
    scopes: frozenset[str] = field(default_factory=frozenset)

    def has(self, scope: str) -> bool:
        """Whether the scopes cover ``scope``: ``*`` covers all, writing includes reading."""
        if EVERYTHING in self.scopes or scope in self.scopes:
            return True
        return scope == READ and WRITE in self.scopes

    def require(self, scope: str) -> None:
        """Return if the scopes cover ``scope``, else raise ``InsufficientScope`` (403)."""
        if not self.has(scope):
            raise InsufficientScope(scope)


def system_actor(team: Team) -> Actor:
    """The console itself acting for a team: expiry, reconciliation, a build's own steps."""
    return Actor(team, None, None, "system", scopes=frozenset({EVERYTHING}))
