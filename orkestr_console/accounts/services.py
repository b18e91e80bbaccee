"""Authentication: tokens, sessions, and the actors they stand for."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta

from django.db.models import Q
from django.http import HttpRequest
from django.utils import timezone

from orkestr_console.accounts import tokens
from orkestr_console.accounts.actor import EVERYTHING, SCOPES, Actor, Subject, Surface
from orkestr_console.accounts.admission import admit
from orkestr_console.accounts.models import ApiToken, Membership, Role, Team, User
from orkestr_console.core.errors import Forbidden, InvalidInput, Unauthenticated
from orkestr_console.core.text import name_problem

# A token's last use is stored to the minute; writing it on every call would cost too much.
LAST_USED_INTERVAL = timedelta(minutes=1)
TEAM_SESSION_KEY = "team_id"
INVALID_TOKEN_CHALLENGE = 'Bearer error="invalid_token"'  # noqa: S105 - a header


def mint_token(
    team: Team,
    name: str,
    scopes: Iterable[str],
    *,
    created_by: User | None = None,
    expires_at: datetime | None = None,
    allowed_templates: list[str] | None = None,
    allowed_networks: list[str] | None = None,
) -> tuple[ApiToken, str]:
    """A new token of ``team`` and its text, which cannot be retrieved again.

    Raises ``InvalidInput`` for an unknown or missing scope, and for an invalid name.
    """
    requested = sorted(set(scopes))
    unknown = [scope for scope in requested if scope not in SCOPES]
    if name_error := name_problem(name):
        raise InvalidInput(f"The token's name {name_error}", fields={"name": name_error})
    if unknown or not requested:
        problem = f"'{unknown[0]}' is not a scope" if unknown else "A token needs a scope"
        raise InvalidInput(f"{problem}; there are {', '.join(SCOPES)}.")
    text, lookup = tokens.new_token()
    row = ApiToken.objects.create(
        team=team,
        created_by=created_by,
        name=name,
        lookup=lookup,
        digest=tokens.digest(text),
        scopes=requested,
        expires_at=expires_at,
        allowed_templates=allowed_templates,
        allowed_networks=allowed_networks,
    )
    return row, text


def authenticate_token(
    text: str, surface: Surface, address: str | None, subject: Subject | None = None
) -> Actor:
    """The actor that a Bearer token stands for, in one statement; the call is counted.

    The statement reads the call's ``subject`` as well.
    Raises ``Unauthenticated``, with the same message for a malformed, unknown or wrong token; for
    one that was valid before, it says whether it has expired or was revoked.
    """
    lookup = tokens.lookup_of(text)
    found = admit(lookup, tokens.digest(text), subject) if lookup else None
    if found is None or not tokens.matches(text, found.token.digest):
        raise Unauthenticated(
            "This API token is unknown; check that you copied all of it.",
            challenge=INVALID_TOKEN_CHALLENGE,
        )
    row = found.token
    if not found.valid:
        word = "has been revoked" if row.revoked_at else "has expired"
        raise Unauthenticated(
            f"This API token {word}; create a new one.", challenge=INVALID_TOKEN_CHALLENGE
        )
    found.require()
    mark_used(row)
    scopes = frozenset(row.scopes)
    return Actor(row.team, row.created_by, row, surface, address, scopes, subject=subject)


def signer_actor(token_id: str, surface: Surface, address: str | None) -> Actor:
    """The actor of a token that signed something earlier; the call is counted as one of its own.

    Raises ``Forbidden`` if it is no longer valid.
    """
    signed = ApiToken.objects.filter(pk=token_id).values_list("lookup", "digest").first()
    found = admit(*signed) if signed else None
    if found is None or not found.valid:
        raise token_ended()
    found.require()
    mark_used(found.token)
    row = found.token
    return Actor(row.team, row.created_by, row, surface, address, frozenset(row.scopes))


def require_live(token_id: str) -> None:
    """Raise ``Forbidden`` unless the token is valid."""
    token = ApiToken.objects.filter(pk=token_id).first()
    if token is None or not token.is_live():
        raise token_ended()


def token_ended() -> Forbidden:
    """The error for what a token signed that is no longer valid."""
    return Forbidden(
        "The API token that made this address has been revoked or has expired; ask for a new "
        "address with another one.",
        code="address_revoked",
    )


def mark_used(token: ApiToken) -> None:
    """Record that the token was used now, at most once a minute."""
    now = timezone.now()
    stale = now - LAST_USED_INTERVAL
    if token.last_used_at is None or token.last_used_at < stale:
        not_recorded = Q(last_used_at__isnull=True) | Q(last_used_at__lt=stale)
        ApiToken.objects.filter(not_recorded, pk=token.pk).update(last_used_at=now)


def revoke_token(token: ApiToken) -> None:
    """Revoke a token immediately; idempotent."""
    ApiToken.objects.filter(pk=token.pk, revoked_at=None).update(revoked_at=timezone.now())


def session_actor(request: HttpRequest) -> Actor:
    """The signed-in person, acting for their session's team, else for their first team.

    Raises ``Forbidden`` for a person without a team.
    """
    user = request.user
    assert isinstance(user, User)
    return user_actor(user, request.session.get(TEAM_SESSION_KEY), request.META.get("REMOTE_ADDR"))


def user_actor(user: User, team_id: str | None, address: str | None) -> Actor:
    """``user``, acting for team ``team_id`` if they are a member, else for their first team.

    An operator may act for any team, as an owner. Raises ``Forbidden`` for a person without a team.
    """
    scopes = frozenset({EVERYTHING})
    memberships = list(
        Membership.objects.filter(user=user).select_related("team__plan").order_by("created_at")
    )
    membership = next(
        (membership for membership in memberships if membership.team_id == team_id), None
    )
    if membership is None and user.is_staff:
        teams = Team.objects.select_related("plan")
        visited = teams.filter(pk=team_id).first() or (None if memberships else teams.first())
        if visited is not None:
            return Actor(visited, user, None, "console", address, scopes, Role.OWNER)
    if not memberships:
        raise Forbidden("You are in no team yet; ask an administrator to add you to one.")
    membership = membership or memberships[0]
    role = Role.OWNER if user.is_staff else Role(membership.role)
    return Actor(membership.team, user, None, "console", address, scopes, role)
