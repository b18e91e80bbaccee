"""The caller: who, for which team, through which surface, and with which scopes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, cast

from django.db import models

from orkestr_console.accounts.models import ApiToken, Role, Team, User
from orkestr_console.core.errors import Forbidden, InsufficientScope

type Surface = Literal["console", "rest", "mcp", "system"]

READ = "sandboxes:read"
WRITE = "sandboxes:write"
EVERYTHING = "*"
SCOPES = (READ, WRITE, EVERYTHING)


@dataclass(slots=True)
class Subject:
    """The row of the caller's team that a call is about; it comes with the call's admission."""

    model: type[models.Model]
    id: str
    row: models.Model | None = None


@dataclass(frozen=True, slots=True)
class Actor:
    """The caller of a service.

    ``address`` is the caller's network address, if there is one. ``scopes`` are the token's; a
    person in the console and the system itself have ``*``. An operator has the owner role in every
    team.
    """

    team: Team
    user: User | None
    token: ApiToken | None
    surface: Surface
    address: str | None = None
    scopes: frozenset[str] = field(default_factory=frozenset)
    # The person's role in the team; None for a token, which cannot act as an admin.
    role: Role | None = None
    subject: Subject | None = None

    def take_subject[M: models.Model](self, model: type[M], key: str) -> M | None:
        """The row that has come with this call, if it is that one; only once, as it gets old."""
        subject = self.subject
        if subject is None or (subject.model, subject.id) != (model, key):
            return None
        row, subject.row = subject.row, None
        return cast("M | None", row)

    def has(self, scope: str) -> bool:
        """Whether the scopes cover ``scope``: ``*`` covers all, writing includes reading."""
        if EVERYTHING in self.scopes or scope in self.scopes:
            return True
        return scope == READ and WRITE in self.scopes

    def require(self, scope: str) -> None:
        """Raise ``InsufficientScope`` (403) unless the scopes cover ``scope``."""
        if not self.has(scope):
            raise InsufficientScope(scope)

    def is_at_least(self, role: Role) -> bool:
        """Whether the person's role includes ``role``."""
        return self.role is not None and self.role.rank >= role.rank

    def require_role(self, role: Role) -> None:
        """Raise ``Forbidden`` (403) unless the person's role includes ``role``."""
        if not self.is_at_least(role):
            raise Forbidden(f"Only an {role.value} of the team can do this; ask one of them.")

    @property
    def is_operator(self) -> bool:
        """Whether an operator of this server is acting, in the console."""
        return self.token is None and self.user is not None and self.user.is_staff

    def require_template(self, name: str) -> None:
        """Raise ``Forbidden`` if the token is restricted to other templates or bases."""
        if self.token:
            require_allowed(self.token.allowed_templates, "template or base", name)

    def require_network(self, network: str) -> None:
        """Raise ``Forbidden`` if the token is restricted to other networks."""
        if self.token:
            require_allowed(
                self.token.allowed_networks, "network", network, code="network_policy_blocked"
            )


def require_allowed(
    allowed: list[str] | None, kind: str, requested: str, code: str = "token_restricted"
) -> None:
    """Raise ``Forbidden`` unless ``asked`` is among ``allowed``, or everything is."""
    if allowed is not None and requested not in allowed:
        named = ", ".join(allowed) or "none"
        raise Forbidden(
            f"This API token can't use the {kind} {requested!r}, only: {named}. Use another token.",
            code=code,
        )


def system_actor(team: Team) -> Actor:
    """The console itself acting for a team: expiry, reconciliation, a build's own steps."""
    return Actor(team, None, None, "system", scopes=frozenset({EVERYTHING}))
