"""The tokens that an API token may see, make and end: those of its own person in its own team.

A token never gives more than it has. What it makes has its scopes and restrictions, ends no later,
and is revoked together with it; and it ends only tokens that can do no more than itself. A token
that signs itself off is the exception: what it made stays, as a program that signs in anew retires
its former token that way.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated

from django.db import transaction
from django.db.models import Q, QuerySet
from django.utils import timezone
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from orkestr_console.accounts.actor import READ, WRITE, Actor
from orkestr_console.accounts.api_tokens import MAX_DAYS, end, record_created, record_revoked
from orkestr_console.accounts.audit import audited
from orkestr_console.accounts.models import ApiToken, Membership, Role, Team, TokenOrigin, User
from orkestr_console.accounts.services import mint_token, revoke_token
from orkestr_console.core.errors import Conflict, Forbidden, InvalidInput, NotFound, Unauthenticated
from orkestr_console.core.text import readable

# A program that makes tokens in a loop is a mistake, or worse.
MAX_LIVE = 100
# The official command line shows so much of an id in its list.
MIN_SHOWN = 8
NO_SUCH_TOKEN = "You have no such token; list your tokens to see their ids."  # noqa: S105


class OwnTokenSpec(BaseModel):
    """A token to create; without ``expires_in_days`` it expires with the one that makes it."""

    model_config = ConfigDict(strict=True, extra="forbid", str_strip_whitespace=True)

    name: Annotated[str, Field(min_length=1, max_length=100), AfterValidator(readable)]
    expires_in_days: Annotated[int, Field(ge=1, le=MAX_DAYS)] | None = None


def own_tokens(actor: Actor) -> QuerySet[ApiToken]:
    """The tokens of the caller's person in its team; without a person, its own and what it made."""
    rows = ApiToken.objects.filter(team=actor.team, created_by=actor.user)
    if actor.user is None:
        token = calling_token(actor)
        rows = rows.filter(Q(pk=token.pk) | Q(origin__issuer=token))
    return rows


def calling_token(actor: Actor) -> ApiToken:
    """The token that calls: these services are for tokens only."""
    assert actor.token is not None
    return actor.token


def list_own(actor: Actor) -> list[ApiToken]:
    """Those that were not revoked, newest first."""
    actor.require(READ)
    return list(own_tokens(actor).filter(revoked_at=None).order_by("-created_at"))


@audited("token.create", "token")
def create_own(actor: Actor, spec: OwnTokenSpec) -> tuple[ApiToken, str]:
    """A token that can do what the caller can, and its text, which cannot be retrieved again.

    Raises ``InsufficientScope``, ``InvalidInput`` for an expiry after the caller's, ``Conflict``
    if there are too many, and ``Forbidden`` if the caller's person is no admin of the team.
    """
    actor.require(WRITE)
    if actor.user is not None:
        require_admin(actor.user, actor.team)
    with transaction.atomic():
        # Whoever revokes it waits for this, and revokes what was made as well.
        rows = ApiToken.objects.select_for_update(no_key=True, of=("self",))
        issuer = rows.get(pk=calling_token(actor).pk)
        if not issuer.is_live():
            raise Unauthenticated("This API token was just revoked or has expired.")
        require_room(actor)
        token, text = mint_token(
            actor.team,
            spec.name,
            issuer.scopes,
            created_by=actor.user,
            expires_at=expiry(issuer, spec.expires_in_days),
            allowed_templates=issuer.allowed_templates,
            allowed_networks=issuer.allowed_networks,
        )
        TokenOrigin.objects.create(token=token, issuer=issuer)
        record_created(actor, token, issuer=issuer.prefix)
    return token, text


def require_admin(user: User, team: Team) -> None:
    """Raise ``Forbidden`` unless the person may create tokens of the team now."""
    if user.is_active and user.is_staff:
        return
    place = Membership.objects.filter(user=user, team=team).first()
    if not user.is_active or place is None or Role(place.role).rank < Role.ADMIN.rank:
        raise Forbidden(
            f"Only admins of {team.name} can create API tokens, and {user.email} is none; ask one "
            "of them."
        )


def require_room(actor: Actor) -> None:
    """Raise ``Conflict`` if the caller's person has too many tokens already.

    Without a person, if all tokens of the team that have none have made too many: each could make
    others that make more.
    """
    rows, who = own_tokens(actor), "You have"
    if actor.user is None:
        rows = ApiToken.objects.filter(
            team=actor.team, created_by=None, origin__issuer__isnull=False
        )
        who = f"The tokens of {actor.team.name} that are nobody's have made"
    expired = Q(expires_at__lte=timezone.now())
    if rows.filter(revoked_at=None).exclude(expired).count() >= MAX_LIVE:
        raise Conflict(f"{who} {MAX_LIVE} API tokens; revoke some that you no longer need.")


def expiry(issuer: ApiToken, days: int | None) -> datetime | None:
    """When a token of ``issuer`` expires. Raises ``InvalidInput`` if that is after it does."""
    if days is None:
        return issuer.expires_at
    wanted = timezone.now() + timedelta(days=days)
    if issuer.expires_at is None or wanted <= issuer.expires_at:
        return wanted
    left = (issuer.expires_at - timezone.now()).days
    most = f"ask for at most {left} days, or leave it out" if left else "leave it out"
    sentence = f"is longer than the token that you call with is valid; {most}."
    raise InvalidInput(f"expires_in_days: {sentence}", fields={"expires_in_days": sentence})


@audited("token.revoke", "token")
def revoke_own(actor: Actor, token_id: str) -> ApiToken:
    """Revoke one, and what it made; ``token_id`` may be the first part of an id. Idempotent.

    Raises ``NotFound``, ``InvalidInput`` for a part that several ids begin with, and ``Forbidden``
    for a token that can do more than the caller.
    """
    token = find_own(actor, token_id)
    if token != calling_token(actor):
        actor.require(WRITE)
        if not covers(actor, token):
            raise Forbidden(
                f"The token '{token.name}' can do more than the one that you call with; revoke it "
                "in the console.",
                code="token_restricted",
            )
    with transaction.atomic():
        end(actor, token)
    return token


def find_own(actor: Actor, token_id: str) -> ApiToken:
    """One by its id, or by the part that lists show. Raises ``NotFound``, ``InvalidInput``."""
    if len(token_id) < MIN_SHOWN:
        raise NotFound(NO_SUCH_TOKEN)
    found = list(own_tokens(actor).filter(lookup__startswith=token_id)[:2])
    if not found:
        raise NotFound(NO_SUCH_TOKEN)
    if len(found) > 1:
        raise InvalidInput("Several of your tokens' ids begin like this; give all of it.")
    return found[0]


def covers(actor: Actor, token: ApiToken) -> bool:
    """Whether the caller can do everything that ``token`` can."""
    own = calling_token(actor)
    restrictions = (
        (own.allowed_templates, token.allowed_templates),
        (own.allowed_networks, token.allowed_networks),
    )
    return all(actor.has(scope) for scope in token.scopes) and all(
        mine is None or (theirs is not None and set(theirs) <= set(mine))
        for mine, theirs in restrictions
    )


@audited("token.revoke", "token")
def sign_off(actor: Actor) -> None:
    """Revoke the calling token alone."""
    token = calling_token(actor)
    with transaction.atomic():
        revoke_token(token)
        record_revoked(actor, token)
