"""What is done with people, teams and tokens."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta

from django.db.models import Q
from django.http import HttpRequest
from django.utils import timezone

from orkestr_console.accounts import limits, rates, tokens
from orkestr_console.accounts.actor import EVERYTHING, SCOPES, Actor, Surface
from orkestr_console.accounts.models import ApiToken, Membership, Role, Team, User
from orkestr_console.core.errors import Forbidden, InvalidInput, Unauthenticated
from orkestr_console.core.text import name_problem

# A token's last use is worth knowing to the minute; writing it on every call is not worth it.
LAST_USE_GRAIN = timedelta(minutes=1)
TEAM_KEY = "team_id"
NO_GOOD = 'Bearer error="invalid_token"'


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
    """A new token of ``team`` and its text, which cannot be had again.

    Raises ``InvalidInput`` for a scope that does not exist, or none, and for a name that is none.
    """
    wanted = sorted(set(scopes))
    unknown = [scope for scope in wanted if scope not in SCOPES]
    if unfit := name_problem(name):
        raise InvalidInput(f"The token's name {unfit}", fields={"name": unfit})
    if unknown or not wanted:
        problem = f"'{unknown[0]}' is not a scope" if unknown else "A token needs a scope"
        raise InvalidInput(f"{problem}; there are {', '.join(SCOPES)}.")
    text, lookup = tokens.new_token()
    row = ApiToken.objects.create(
        team=team,
        created_by=created_by,
        name=name,
        lookup=lookup,
        digest=tokens.digest(text),
        scopes=wanted,
        expires_at=expires_at,
        allowed_templates=allowed_templates,
        allowed_networks=allowed_networks,
    )
    return row, text


def actor_of_token(text: str, surface: Surface, address: str | None) -> Actor:
    """The actor that a Bearer token stands for, in one query.

    Raises ``Unauthenticated``, the same for a token that is malformed, unknown or wrong; for one
    that was good once it says whether it has expired or been revoked.
    """
    lookup = tokens.lookup_of(text)
    # With everything that limits the team: what follows needs no second look.
    related = ("team__plan", "team__limits", "team__agreement", "created_by")
    row = lookup and ApiToken.objects.select_related(*related).filter(lookup=lookup).first()
    if not row or not tokens.matches(text, row.digest):
        raise Unauthenticated(
            "This API token is unknown; check that you copied all of it.", challenge=NO_GOOD
        )
    if not row.is_live():
        word = "has been revoked" if row.revoked_at else "has expired"
        raise Unauthenticated(f"This API token {word}; create a new one.", challenge=NO_GOOD)
    rates.take(row, limits.build(row.team).value("api_requests_per_minute"))
    note_use(row)
    return Actor(row.team, row.created_by, row, surface, address, frozenset(row.scopes))


def note_use(token: ApiToken) -> None:
    """Remember that the token was used now, at most once a minute."""
    now = timezone.now()
    stale = now - LAST_USE_GRAIN
    if token.last_used_at is None or token.last_used_at < stale:
        unnoted = Q(last_used_at__isnull=True) | Q(last_used_at__lt=stale)
        ApiToken.objects.filter(unnoted, pk=token.pk).update(last_used_at=now)


def revoke_token(token: ApiToken) -> None:
    """End a token at once; again is fine."""
    ApiToken.objects.filter(pk=token.pk, revoked_at=None).update(revoked_at=timezone.now())


def actor_of_session(request: HttpRequest) -> Actor:
    """The signed-in person acting for the team their session names, else their first.

    Raises ``Forbidden`` for a person without a team.
    """
    user = request.user
    assert isinstance(user, User)
    return actor_of_user(user, request.session.get(TEAM_KEY), request.META.get("REMOTE_ADDR"))


def actor_of_user(user: User, team_id: str | None, address: str | None) -> Actor:
    """``user`` acting for team ``team_id`` if a member of it, else for their first team.

    An operator may act for any team, as an owner. Raises ``Forbidden`` for a person without a team.
    """
    scopes = frozenset({EVERYTHING})
    places = list(
        Membership.objects.filter(user=user).select_related("team__plan").order_by("created_at")
    )
    place = next((place for place in places if place.team_id == team_id), None)
    if place is None and user.is_staff:
        teams = Team.objects.select_related("plan")
        visited = teams.filter(pk=team_id).first() or (None if places else teams.first())
        if visited is not None:
            return Actor(visited, user, None, "console", address, scopes, Role.OWNER)
    if not places:
        raise Forbidden("You are in no team yet; ask an administrator to add you to one.")
    place = place or places[0]
    role = Role.OWNER if user.is_staff else Role(place.role)
    return Actor(place.team, user, None, "console", address, scopes, role)
