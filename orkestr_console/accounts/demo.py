"""The demo team of a new installation."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from django.db import transaction

from orkestr_console.accounts.actor import READ, WRITE
from orkestr_console.accounts.models import Membership, Role, Team, User
from orkestr_console.accounts.services import authenticate_token, mint_token, revoke_token
from orkestr_console.core.errors import Unauthenticated

TEAM = "Demo"
SLUG = "demo"
EMAIL = "admin@demo.example"
TOKEN = "Demo"  # noqa: S105 - the token's name, not the token


@transaction.atomic
def ensure_demo(previous: Mapping[str, Any]) -> dict[str, str]:
    """Create what is missing of the demo team on plan Team, its admin and an API token.

    ``previous`` is an earlier call's result, if known: its password and token are kept if they
    still work, and replaced otherwise. Returns ``user, password, team, api_key``.
    """
    team, _ = Team.objects.get_or_create(slug=SLUG, defaults={"name": TEAM, "plan_id": "team"})
    user = ensure_admin(team)
    return {
        "user": user.email,
        "password": keep_or_set_password(user, str(previous.get("password", ""))),
        "team": team.name,
        "api_key": keep_or_mint_token(team, user, str(previous.get("api_key", ""))),
    }


def ensure_admin(team: Team) -> User:
    """The person who owns the demo team."""
    user = User.objects.filter(email=EMAIL).first()
    if user is None:
        user = User.objects.create_user(EMAIL, name="Demo Admin")
    Membership.objects.get_or_create(user=user, team=team, defaults={"role": Role.OWNER})
    return user


def keep_or_set_password(user: User, password: str) -> str:
    """``password`` if the user can sign in with it, else a new one that is set for them."""
    if password and user.is_active and user.check_password(password):
        return password
    new_password = secrets.token_urlsafe(15)
    user.set_password(new_password)
    user.is_active = True
    user.save(update_fields=["password", "is_active"])
    return new_password


def keep_or_mint_token(team: Team, user: User, api_key: str) -> str:
    """``api_key`` if it is still valid for the team with both scopes, else a new token."""
    try:
        actor = authenticate_token(api_key, "system", None)
        if actor.team == team and actor.has(READ) and actor.has(WRITE):
            return api_key
    except Unauthenticated:
        # The earlier key is unknown, revoked or from another database.
        pass
    for stale in team.tokens.filter(name=TOKEN, created_by=user, revoked_at=None):
        revoke_token(stale)
    return mint_token(team, TOKEN, [READ, WRITE], created_by=user)[1]
