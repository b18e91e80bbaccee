"""A team's members: inviting, joining, roles, shares, leaving.

Owners appoint and demote owners, admins everybody else. A team always has an owner: whatever could
remove the last one locks the team's row first, so that two cannot both leave concurrently.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Any

from django.contrib.auth.password_validation import validate_password
from django.core.exceptions import ValidationError
from django.core.validators import validate_email
from django.db import transaction
from django.utils import timezone
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from orkestr_console.accounts import audit
from orkestr_console.accounts.actor import EVERYTHING, Actor
from orkestr_console.accounts.audit import audited
from orkestr_console.accounts.limit_changes import Amount
from orkestr_console.accounts.models import ApiToken, Invitation, Membership, Role, Team, User
from orkestr_console.core.channel_layer import notify
from orkestr_console.core.errors import Conflict, Forbidden, InvalidInput, NotFound
from orkestr_console.core.text import name_problem, readable, replace_unstorable

INVITATION_DAYS = 7
MAX_OPEN_INVITATIONS = 100
LAST_OWNER = (
    "This is the team's last owner. Make somebody else an owner first: a team always has one."
)
PERSON_NOT_FOUND = "There is no such person in your team."


class InviteSpec(BaseModel):
    """Whom to invite; with a blank ``email``, anybody with the link."""

    model_config = ConfigDict(extra="forbid", str_strip_whitespace=True)

    role: Role = Role.MEMBER
    email: Annotated[str, Field(max_length=254)] = ""


class ShareSpec(BaseModel):
    """One person's share of the team's limits; None is the team's default share."""

    model_config = ConfigDict(extra="forbid")

    max_templates: Amount | None = None
    max_concurrent_sandboxes: Amount | None = None


class NewPersonSpec(BaseModel):
    """Somebody without an account."""

    model_config = ConfigDict(extra="forbid", str_strip_whitespace=True)

    name: Annotated[str, Field(min_length=1, max_length=100), AfterValidator(readable)]
    email: Annotated[str, Field(min_length=3, max_length=254)]


@dataclass(frozen=True)
class Departure:
    """Somebody who was removed or left.

    ``tokens`` is how many of their API tokens still work, ``invitations`` how many of their open
    invitations were revoked.
    """

    name: str
    tokens: int
    invitations: int


def people_group(team_id: str) -> str:
    """The channel group for changes of a team's members and roles."""
    return f"team.{team_id}.people"


def notify_people_changed(team_id: str) -> None:
    """Have open pages re-check who may see them."""
    notify(people_group(team_id), {"type": "people.changed"})


# Seeing ---------------------------------------------------------------------------------------


def list_people(actor: Actor) -> list[Membership]:
    """The team's people, owners first."""
    rows = Membership.objects.filter(team=actor.team).select_related("user")
    return sorted(rows, key=lambda row: (-Role(row.role).rank, row.created_at))


def list_invitations(actor: Actor) -> list[Invitation]:
    """The invitations that are still open. Raises ``Forbidden`` for a member."""
    actor.require_role(Role.ADMIN)
    rows = Invitation.objects.filter(team=actor.team, accepted_at=None, revoked_at=None)
    return list(rows.filter(expires_at__gt=timezone.now()).select_related("created_by"))


def list_teams(user: User, text: str = "") -> list[Team]:
    """The teams a person may act for, filtered by ``text``; all teams for an operator."""
    teams = Team.objects.select_related("plan").order_by("name", "pk")
    found = teams if user.is_staff else teams.filter(memberships__user=user)
    return list(found.filter(name__icontains=text) if text else found)


# Inviting and joining -------------------------------------------------------------------------


def digest(secret: str) -> str:
    """The stored digest of an invitation's secret: 256 random bits need no slow hash."""
    return hashlib.sha256(secret.encode()).hexdigest()


@audited("invitation.create", "invitation")
def invite(actor: Actor, spec: InviteSpec) -> tuple[Invitation, str]:
    """A new invitation and its link's secret, which cannot be retrieved again.

    Raises ``Forbidden`` for a member, and for an admin who invites an owner.
    """
    actor.require_role(Role.ADMIN)
    actor.require_role(spec.role)
    email = normalize_email(spec.email) if spec.email else ""
    if email and Membership.objects.filter(team=actor.team, user__email=email).exists():
        raise InvalidInput(
            f"{email} is already in the team.", fields={"email": "is already in the team."}
        )
    if len(list_invitations(actor)) >= MAX_OPEN_INVITATIONS:
        raise Conflict(f"There are {MAX_OPEN_INVITATIONS} open invitations; revoke some first.")
    secret = secrets.token_urlsafe(32)
    with transaction.atomic():
        row = Invitation.objects.create(
            team=actor.team,
            role=spec.role,
            email=email,
            digest=digest(secret),
            created_by=actor.user,
            expires_at=timezone.now() + timedelta(days=INVITATION_DAYS),
        )
        data = {"role": row.role}
        audit.record(
            actor, "invitation.create", kind="invitation", object_id=row.pk, name=email, data=data
        )
    return row, secret


def normalize_email(text: str) -> str:
    """The address in lower case. Raises ``InvalidInput``."""
    email = text.strip().lower()
    sentence = name_problem(email)
    try:
        # It validates the domain's IDNA form, which drops invisible characters.
        validate_email(email)
    except ValidationError:
        sentence = "is not a valid email address."
    if sentence:
        raise InvalidInput(f"email: {sentence}", fields={"email": sentence})
    return email


@audited("invitation.revoke", "invitation")
def revoke_invitation(actor: Actor, invitation_id: str) -> None:
    """Revoke an invitation; idempotent. Raises ``NotFound``."""
    actor.require_role(Role.ADMIN)
    with transaction.atomic():
        row = Invitation.objects.filter(team=actor.team, pk=invitation_id).first()
        if row is None:
            raise NotFound("There is no such invitation.")
        if row.is_open():
            Invitation.objects.filter(pk=row.pk).update(revoked_at=timezone.now())
            record_revoked(actor, row)


def find_invitation(secret: str, *, locked: bool = False) -> Invitation:
    """The invitation behind a link. Raises ``NotFound`` with the reason if it is not open."""
    rows = Invitation.objects.select_related("team__plan", "created_by")
    if locked:
        # The team first, in the same order as removing or demoting its inviter.
        teams = Team.objects.filter(invitations__digest=digest(secret))
        teams.select_for_update(of=("self",)).first()
        rows = rows.select_for_update(of=("self",))
    row = rows.filter(digest=digest(secret)).first()
    if row is None:
        raise NotFound("This invitation does not exist. Check that the link is complete.")
    authorized = is_inviter_authorized(row)
    if row.is_open() and authorized:
        return row
    reason = "used" if row.accepted_at else "revoked" if row.revoked_at or not authorized else None
    problem = f"has been {reason} already" if reason else "has expired"
    raise NotFound(f"This invitation {problem}. Ask whoever sent it for a new one.")


def is_inviter_authorized(invitation: Invitation) -> bool:
    """Whether its inviter still has at least the role that it gives."""
    inviter = invitation.created_by
    if inviter is None or inviter.is_staff:
        return inviter is not None
    membership = Membership.objects.filter(team=invitation.team_id, user=inviter).first()
    return membership is not None and Role(membership.role).rank >= Role(invitation.role).rank


def revoke_invitations_above(
    actor: Actor, membership: Membership, remaining_role: Role | None
) -> int:
    """Revoke a person's open invitations above ``remaining_role``, or all for None; how many.

    The team is locked.
    """
    rows = Invitation.objects.filter(team=actor.team, created_by=membership.user)
    rows = rows.filter(accepted_at=None, revoked_at=None, expires_at__gt=timezone.now())
    above = [role for role in Role if remaining_role is None or role.rank > remaining_role.rank]
    found = list(rows.filter(role__in=above).select_for_update(of=("self",)).order_by("pk"))
    for row in found:
        Invitation.objects.filter(pk=row.pk).update(revoked_at=timezone.now())
        record_revoked(actor, row)
    return len(found)


def record_revoked(actor: Actor, row: Invitation) -> None:
    """Record a revoked invitation in the audit log."""
    audit.record(actor, "invitation.revoke", kind="invitation", object_id=row.pk, name=row.email)


@contextmanager
def record_refusals(secret: str, user: User, address: str | None) -> Iterator[None]:
    """Record in the team's log that ``user``, perhaps without an account, was refused."""
    row = Invitation.objects.select_related("team").filter(digest=digest(secret)).first()
    if row is None:
        # It belongs to no team.
        yield
        return
    with audit.denials(invitee_actor(row, user, address), "member.join", "invitation", row.pk):
        yield


def invitee_actor(invitation: Invitation, user: User, address: str | None) -> Actor:
    """The person who accepts an invitation, acting in its team."""
    return Actor(invitation.team, user, None, "console", address, frozenset({EVERYTHING}))


def accept_invitation(user: User, secret: str, address: str | None) -> Membership:
    """Accept an invitation. Raises ``NotFound``, ``Forbidden`` (another's), ``Conflict``."""
    with record_refusals(secret, user, address), transaction.atomic():
        return create_membership(find_invitation(secret, locked=True), user, address)


def create_membership(invitation: Invitation, user: User, address: str | None) -> Membership:
    """Create the membership of a locked invitation. Raises ``Forbidden``, ``Conflict``."""
    if invitation.email and invitation.email != user.email:
        raise Forbidden(
            f"This invitation is for {invitation.email}, and you are signed in as {user.email}. "
            "Sign out and open it again, or ask for one for your address."
        )
    membership, created = Membership.objects.get_or_create(
        user=user, team=invitation.team, defaults={"role": invitation.role}
    )
    if not created:
        raise Conflict(f"You are in {invitation.team.name} already, as {membership.role}.")
    Invitation.objects.filter(pk=invitation.pk).update(accepted_at=timezone.now(), accepted_by=user)
    actor = invitee_actor(invitation, user, address)
    data = {"role": membership.role, "invitation": invitation.pk}
    audit.record(actor, "member.join", kind="user", object_id=user.pk, name=user.email, data=data)
    notify_people_changed(invitation.team_id)
    return membership


def register(spec: NewPersonSpec, password: str, secret: str, address: str | None) -> User:
    """Create an account and accept the invitation with it.

    Raises ``InvalidInput`` for an address that already has an account, and for a weak password.
    """
    unregistered = User(
        email=replace_unstorable(spec.email)[: audit.MAX_NAME_LENGTH], name=spec.name
    )
    with record_refusals(secret, unregistered, address), transaction.atomic():
        invitation = find_invitation(secret, locked=True)
        user = User(email=new_account_email(spec.email, invitation), name=spec.name)
        require_strong(password, user)
        user.set_password(password)
        user.save()
        create_membership(invitation, user, address)
    return user


def new_account_email(text: str, invitation: Invitation) -> str:
    """The address for a new account. Raises ``InvalidInput``."""
    email = normalize_email(text)
    if invitation.email and invitation.email != email:
        sentence = f"must be {invitation.email}, whom this invitation is for."
        raise InvalidInput(f"email {sentence}", fields={"email": sentence})
    if User.objects.filter(email=email).exists():
        sentence = "already has an account: sign in, then open the link again."
        raise InvalidInput(f"email {sentence}", fields={"email": sentence})
    return email


def require_strong(password: str, user: User) -> None:
    """Raise ``InvalidInput`` with the messages of the password validators."""
    try:
        validate_password(password, user)
    except ValidationError as error:
        message = " ".join(error.messages)
        raise InvalidInput(message, fields={"password": message}) from None


# Changing and leaving -------------------------------------------------------------------------


def lock_membership(actor: Actor, user_id: int) -> Membership:
    """A person's membership, with the team's row locked. Raises ``NotFound``."""
    Team.objects.select_for_update().get(pk=actor.team.pk)
    rows = Membership.objects.filter(team=actor.team, user_id=user_id).select_related("user")
    membership = rows.first()
    if membership is None:
        raise NotFound(PERSON_NOT_FOUND)
    return membership


def require_other_owner(membership: Membership) -> None:
    """Raise ``Conflict`` if this is the last owner. The caller has locked the team."""
    others = Membership.objects.filter(team_id=membership.team_id, role=Role.OWNER).exclude(
        pk=membership.pk
    )
    if membership.role == Role.OWNER and not others.exists():
        raise Conflict(LAST_OWNER, code="last_owner")


@audited("member.role", "user")
def change_role(actor: Actor, user_id: int, role: Role) -> Membership:
    """Change somebody's role.

    Their open invitations for roles above the new one are revoked. Raises ``Forbidden``,
    ``NotFound``, and ``Conflict`` for the last owner.
    """
    actor.require_role(Role.ADMIN)
    with transaction.atomic():
        membership = lock_membership(actor, user_id)
        if Role.OWNER in {role, membership.role}:
            actor.require_role(Role.OWNER)
        if role != Role.OWNER:
            require_other_owner(membership)
        if membership.role != role:
            data = {"changed": {"role": [membership.role, role]}}
            membership.role = role
            membership.save(update_fields=["role"])
            record_change(actor, "member.role", membership, data)
            revoke_invitations_above(actor, membership, role)
    return membership


@audited("member.share", "user")
def set_share(actor: Actor, user_id: int, spec: ShareSpec) -> Membership:
    """Set somebody's personal share. Raises ``Forbidden``, ``NotFound``."""
    actor.require_role(Role.ADMIN)
    with transaction.atomic():
        membership = lock_membership(actor, user_id)
        before = [membership.max_templates, membership.max_concurrent_sandboxes]
        membership.max_templates = spec.max_templates
        membership.max_concurrent_sandboxes = spec.max_concurrent_sandboxes
        membership.save(update_fields=["max_templates", "max_concurrent_sandboxes"])
        after = [membership.max_templates, membership.max_concurrent_sandboxes]
        if after != before:
            record_change(
                actor, "member.share", membership, {"changed": {"shares": [before, after]}}
            )
    return membership


@audited("member.remove", "user")
def remove(actor: Actor, user_id: int) -> Departure:
    """Remove somebody from the team: their next request is refused.

    Raises ``Forbidden``, ``NotFound``, and ``Conflict`` for the last owner.
    """
    actor.require_role(Role.ADMIN)
    with transaction.atomic():
        membership = lock_membership(actor, user_id)
        if membership.role == Role.OWNER:
            actor.require_role(Role.OWNER)
        return end_membership(actor, "member.remove", membership)


@audited("member.leave", "user")
def leave(actor: Actor) -> Departure:
    """Leave the team. Raises ``NotFound`` for an operator who isn't a member, and ``Conflict``."""
    if actor.user is None:
        raise Forbidden("An API token can't leave a team.")
    with transaction.atomic():
        return end_membership(actor, "member.leave", lock_membership(actor, actor.user.pk))


def end_membership(actor: Actor, action: str, membership: Membership) -> Departure:
    """Delete a membership and revoke its invitations. The caller has locked the team."""
    require_other_owner(membership)
    tokens = ApiToken.objects.filter(team=actor.team, created_by=membership.user, revoked_at=None)
    record_change(actor, action, membership, {"role": membership.role})
    membership.delete()
    return Departure(
        membership.user.get_full_name(),
        tokens.count(),
        revoke_invitations_above(actor, membership, None),
    )


def record_change(actor: Actor, action: str, membership: Membership, data: dict[str, Any]) -> None:
    """Record the change in the audit log, and notify open pages."""
    user = membership.user
    audit.record(actor, action, kind="user", object_id=user.pk, name=user.email, data=data)
    notify_people_changed(membership.team_id)
