"""A team's API tokens: its admins create, list and revoke them."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Literal

from django.db import transaction
from django.utils import timezone
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from orkestr_console.accounts import audit
from orkestr_console.accounts.actor import Actor
from orkestr_console.accounts.audit import audited
from orkestr_console.accounts.models import ApiToken, Role, TokenOrigin
from orkestr_console.accounts.services import mint_token, revoke_token
from orkestr_console.core.errors import InvalidInput, NotFound
from orkestr_console.core.text import readable

MAX_DAYS = 3650
MAX_TEMPLATES = 200


class TokenSpec(BaseModel):
    """A token to create; None means no restriction, or no expiry."""

    model_config = ConfigDict(extra="forbid", str_strip_whitespace=True)

    name: Annotated[str, Field(min_length=1, max_length=100), AfterValidator(readable)]
    scopes: Annotated[list[str], Field(min_length=1)]
    days: Annotated[int, Field(ge=1, le=MAX_DAYS)] | None = None
    templates: Annotated[list[str], Field(max_length=MAX_TEMPLATES)] | None = None
    networks: list[Literal["off", "restricted", "open"]] | None = None


@audited("token.create", "token")
def create_token(actor: Actor, spec: TokenSpec) -> tuple[ApiToken, str]:
    """A new token and its text, which cannot be retrieved again.

    Raises ``Forbidden`` for a member and ``InvalidInput`` for a restriction that allows nothing.
    """
    actor.require_role(Role.ADMIN)
    for field, chosen in (("templates", spec.templates), ("networks", spec.networks)):
        if chosen is not None and not chosen:
            raise InvalidInput(
                f"{field}: choose at least one, or do not restrict it.",
                fields={field: "must have at least one chosen."},
            )
    expires_at = timezone.now() + timedelta(days=spec.days) if spec.days else None
    with transaction.atomic():
        token, text = mint_token(
            actor.team,
            spec.name,
            spec.scopes,
            created_by=actor.user,
            expires_at=expires_at,
            allowed_templates=spec.templates,
            allowed_networks=list(spec.networks) if spec.networks is not None else None,
        )
        record_created(actor, token)
    return token, text


def record_created(actor: Actor, token: ApiToken, **origin: str) -> None:
    """Record in the audit log a new token, its permissions, and where it comes from."""
    data = {
        "token": token.prefix,
        "scopes": token.scopes,
        "expires_at": token.expires_at.isoformat() if token.expires_at else None,
        "templates": token.allowed_templates,
        "networks": token.allowed_networks,
        **origin,
    }
    audit.record(
        actor, "token.create", kind="token", object_id=token.pk, name=token.name, data=data
    )


def list_tokens(actor: Actor) -> list[ApiToken]:
    """The team's tokens, newest first. Raises ``Forbidden`` for a member."""
    actor.require_role(Role.ADMIN)
    rows = ApiToken.objects.filter(team=actor.team).select_related("created_by", "origin__issuer")
    return list(rows.order_by("-created_at"))


@audited("token.revoke", "token")
def revoke(actor: Actor, token_id: str) -> ApiToken:
    """Revoke one of the team's tokens, and those it made: their next call is refused. Idempotent.

    Raises ``NotFound``, and ``Forbidden`` for a member.
    """
    actor.require_role(Role.ADMIN)
    with transaction.atomic():
        token = ApiToken.objects.filter(team=actor.team, pk=token_id).first()
        if token is None:
            raise NotFound("There is no such token.")
        end(actor, token)
    return token


def end(actor: Actor, token: ApiToken) -> None:
    """Revoke a token and, whoever holds them, those that came of it; in a transaction.

    It is locked before those are looked for: while it makes another, this waits.
    """
    generation = [token.pk]
    while generation:
        rows = ApiToken.objects.select_for_update(no_key=True, of=("self",))
        for row in rows.filter(pk__in=generation).order_by("pk"):
            if row.revoked_at is None:
                revoke_token(row)
                record_revoked(actor, row)
        issued = TokenOrigin.objects.filter(issuer__in=generation)
        generation = list(issued.values_list("token", flat=True))


def record_revoked(actor: Actor, token: ApiToken) -> None:
    """Record in the audit log that a token was revoked."""
    data = {"token": token.prefix}
    audit.record(
        actor, "token.revoke", kind="token", object_id=token.pk, name=token.name, data=data
    )
