"""Who is in a team: inviting, joining, roles, shares, leaving.

Owners make and unmake owners, admins everybody else. A team always has an owner: whatever could
take the last one away locks the team's row first, so two who leave at once do not both.
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
MOST_OPEN_INVITATIONS = 100
LAST_OWNER = (
    "This is the team's last owner. Make somebody else an owner first: a team always has one."
)
NO_SUCH_PERSON = "There is no such person in your team."


class InviteSpec(BaseModel):
    """Whom to invite: ``email`` blank is whoever has the link."""

    model_config = ConfigDict(extra="forbid", str_strip_whitespace=True)

    role: Role = Role.MEMBER
    email: Annotated[str, Field(max_length=254)] = ""


class ShareSpec(BaseModel):
    """One person's share of the team's limits; None is what everybody has."""

    model_config = ConfigDict(extra="forbid")

    max_templates: Amount | None = None
    max_concurrent_sandboxes: Amount | None = None


class NewPersonSpec(BaseModel):
    """Somebody who has no account yet."""

    model_config = ConfigDict(extra="forbid", str_strip_whitespace=True)

    name: Annotated[str, Field(min_length=1, max_length=100), AfterValidator(readable)]
    email: Annotated[str, Field(min_length=3, max_length=254)]


@dataclass(frozen=True)
class Departure:
    """Somebody who was removed or left.

    ``tokens`` is how many API tokens of theirs still work, ``invitations`` how many of their open
    invitations were revoked.
    """

    name: str
    tokens: int
    invitations: int


def people_group(team_id: str) -> str:
    """The group of those to tell that who is in a team, and as what, has changed."""
    return f"team.{team_id}.people"


def tell(team_id: str) -> None:
    """Let open pages look again at who may see them."""
    notify(people_group(team_id), {"type": "people.changed"})


# Seeing ---------------------------------------------------------------------------------------


def list_people(actor: Actor) -> list[Membership]:
    """The team's people, owners first."""
    rows = Membership.objects.filter(team=actor.team).select_related("user")
    return sorted(rows, key=lambda row: (-Role(row.role).rank, row.created_at))


def list_invitations(actor: Actor) -> list[Invitation]:
    """The links that can still be taken. Raises ``Forbidden`` for a member."""
    actor.require_role(Role.ADMIN)
    rows = Invitation.objects.filter(team=actor.team, accepted_at=None, revoked_at=None)
    return list(rows.filter(expires_at__gt=timezone.now()).select_related("created_by"))


def list_teams(user: User, text: str = "") -> list[Team]:
    """The teams a person may act for: an operator's are all, found by ``text``."""
    teams = Team.objects.select_related("plan").order_by("name", "pk")
    found = teams if user.is_staff else teams.filter(memberships__user=user)
    return list(found.filter(name__icontains=text) if text else found)


# Inviting and joining -------------------------------------------------------------------------


def digest(secret: str) -> str:
    """What is stored of an invitation: 256 random bits need no slow hash."""
    return hashlib.sha256(secret.encode()).hexdigest()


@audited("invitation.create", "invitation")
def invite(actor: Actor, spec: InviteSpec) -> tuple[Invitation, str]:
    """A new invitation and the secret of its link, which cannot be had again.

    Raises ``Forbidden`` for a member, and for an admin who invites an owner.
    """
    actor.require_role(Role.ADMIN)
    actor.require_role(spec.role)
    email = usable_email(spec.email) if spec.email else ""
    if email and Membership.objects.filter(team=actor.team, user__email=email).exists():
        raise InvalidInput(
            f"{email} is already in the team.", fields={"email": "is already in the team."}
        )
    if len(list_invitations(actor)) >= MOST_OPEN_INVITATIONS:
        raise Conflict(f"There are {MOST_OPEN_INVITATIONS} open invitations; revoke some first.")
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


def usable_email(text: str) -> str:
    """The address in lower case. Raises ``InvalidInput``."""
    email = text.strip().lower()
    sentence = name_problem(email)
    try:
        # It takes a domain by what IDNA makes of it, which drops what cannot be seen.
        validate_email(email)
    except ValidationError:
        sentence = "is not a valid email address."
    if sentence:
        raise InvalidInput(f"email: {sentence}", fields={"email": sentence})
    return email


@audited("invitation.revoke", "invitation")
def revoke_invitation(actor: Actor, invitation_id: str) -> None:
    """Make a link useless; again is fine. Raises ``NotFound``."""
    actor.require_role(Role.ADMIN)
    with transaction.atomic():
        row = Invitation.objects.filter(team=actor.team, pk=invitation_id).first()
        if row is None:
            raise NotFound("There is no such invitation.")
        if row.is_open():
            Invitation.objects.filter(pk=row.pk).update(revoked_at=timezone.now())
            note_revoked(actor, row)


def find_invitation(secret: str, *, locked: bool = False) -> Invitation:
    """The invitation behind a link. Raises ``NotFound`` that says why it cannot be taken."""
    rows = Invitation.objects.select_related("team__plan", "created_by")
    if locked:
        # The team first, as whoever removes or demotes its maker does.
        teams = Team.objects.filter(invitations__digest=digest(secret))
        teams.select_for_update(of=("self",)).first()
        rows = rows.select_for_update(of=("self",))
    row = rows.filter(digest=digest(secret)).first()
    if row is None:
        raise NotFound("This invitation does not exist. Check that the link is complete.")
    backed = is_backed(row)
    if row.is_open() and backed:
        return row
    word = "used" if row.accepted_at else "revoked" if row.revoked_at or not backed else None
    problem = f"has been {word} already" if word else "has expired"
    raise NotFound(f"This invitation {problem}. Ask whoever sent it for a new one.")


def is_backed(invitation: Invitation) -> bool:
    """Whether its maker still has the role that it gives, or more."""
    maker = invitation.created_by
    if maker is None or maker.is_staff:
        return maker is not None
    place = Membership.objects.filter(team=invitation.team_id, user=maker).first()
    return place is not None and Role(place.role).rank >= Role(invitation.role).rank


def withdraw(actor: Actor, place: Membership, left: Role | None) -> int:
    """Revoke a person's open invitations for roles above ``left``, None for all; how many.

    The team is locked.
    """
    rows = Invitation.objects.filter(team=actor.team, created_by=place.user)
    rows = rows.filter(accepted_at=None, revoked_at=None, expires_at__gt=timezone.now())
    above = [role for role in Role if left is None or role.rank > left.rank]
    found = list(rows.filter(role__in=above).select_for_update(of=("self",)).order_by("pk"))
    for row in found:
        Invitation.objects.filter(pk=row.pk).update(revoked_at=timezone.now())
        note_revoked(actor, row)
    return len(found)


def note_revoked(actor: Actor, row: Invitation) -> None:
    """On record: the link is useless."""
    audit.record(actor, "invitation.revoke", kind="invitation", object_id=row.pk, name=row.email)


@contextmanager
def refusals(secret: str, user: User, address: str | None) -> Iterator[None]:
    """Note with the team that ``user``, who may have no account, was refused its invitation."""
    row = Invitation.objects.select_related("team").filter(digest=digest(secret)).first()
    if row is None:
        # It is no team's.
        yield
        return
    with audit.denials(taker(row, user, address), "member.join", "invitation", row.pk):
        yield


def taker(invitation: Invitation, user: User, address: str | None) -> Actor:
    """Whoever takes an invitation, acting in its team."""
    return Actor(invitation.team, user, None, "console", address, frozenset({EVERYTHING}))


def join(user: User, secret: str, address: str | None) -> Membership:
    """Take an invitation. Raises ``NotFound``, ``Forbidden`` (another's), ``Conflict`` (is in)."""
    with refusals(secret, user, address), transaction.atomic():
        return take(find_invitation(secret, locked=True), user, address)


def take(invitation: Invitation, user: User, address: str | None) -> Membership:
    """The place that an invitation gives, which is locked. Raises ``Forbidden``, ``Conflict``."""
    if invitation.email and invitation.email != user.email:
        raise Forbidden(
            f"This invitation is for {invitation.email}, and you are signed in as {user.email}. "
            "Sign out and open it again, or ask for one for your address."
        )
    place, made = Membership.objects.get_or_create(
        user=user, team=invitation.team, defaults={"role": invitation.role}
    )
    if not made:
        raise Conflict(f"You are in {invitation.team.name} already, as {place.role}.")
    Invitation.objects.filter(pk=invitation.pk).update(accepted_at=timezone.now(), accepted_by=user)
    actor = taker(invitation, user, address)
    data = {"role": place.role, "invitation": invitation.pk}
    audit.record(actor, "member.join", kind="user", object_id=user.pk, name=user.email, data=data)
    tell(invitation.team_id)
    return place


def register(spec: NewPersonSpec, password: str, secret: str, address: str | None) -> User:
    """A new person, who takes the invitation with it.

    Raises ``InvalidInput`` for an address that has an account and for a weak password.
    """
    stranger = User(email=replace_unstorable(spec.email)[: audit.LONGEST_NAME], name=spec.name)
    with refusals(secret, stranger, address), transaction.atomic():
        invitation = find_invitation(secret, locked=True)
        user = User(email=free_address(spec.email, invitation), name=spec.name)
        require_strong(password, user)
        user.set_password(password)
        user.save()
        take(invitation, user, address)
    return user


def free_address(text: str, invitation: Invitation) -> str:
    """The address for a new account. Raises ``InvalidInput``."""
    email = usable_email(text)
    if invitation.email and invitation.email != email:
        sentence = f"must be {invitation.email}, whom this invitation is for."
        raise InvalidInput(f"email {sentence}", fields={"email": sentence})
    if User.objects.filter(email=email).exists():
        sentence = "already has an account: sign in, then open the link again."
        raise InvalidInput(f"email {sentence}", fields={"email": sentence})
    return email


def require_strong(password: str, user: User) -> None:
    """Raise ``InvalidInput`` with what the validators of passwords say."""
    try:
        validate_password(password, user)
    except ValidationError as error:
        said = " ".join(error.messages)
        raise InvalidInput(said, fields={"password": said}) from None


# Changing and leaving -------------------------------------------------------------------------


def held_place(actor: Actor, user_id: int) -> Membership:
    """A person's place, with the team locked. Raises ``NotFound``."""
    Team.objects.select_for_update().get(pk=actor.team.pk)
    rows = Membership.objects.filter(team=actor.team, user_id=user_id).select_related("user")
    place = rows.first()
    if place is None:
        raise NotFound(NO_SUCH_PERSON)
    return place


def require_another_owner(place: Membership) -> None:
    """Raise ``Conflict`` if this is the last owner. The team is locked."""
    others = Membership.objects.filter(team_id=place.team_id, role=Role.OWNER).exclude(pk=place.pk)
    if place.role == Role.OWNER and not others.exists():
        raise Conflict(LAST_OWNER, code="last_owner")


@audited("member.role", "user")
def change_role(actor: Actor, user_id: int, role: Role) -> Membership:
    """Make somebody a member, an admin or an owner.

    Their open invitations for roles above the new one are revoked. Raises ``Forbidden``,
    ``NotFound``, and ``Conflict`` for the last owner.
    """
    actor.require_role(Role.ADMIN)
    with transaction.atomic():
        place = held_place(actor, user_id)
        if Role.OWNER in {role, place.role}:
            actor.require_role(Role.OWNER)
        if role != Role.OWNER:
            require_another_owner(place)
        if place.role != role:
            data = {"changed": {"role": [place.role, role]}}
            place.role = role
            place.save(update_fields=["role"])
            note(actor, "member.role", place, data)
            withdraw(actor, place, role)
    return place


@audited("member.share", "user")
def set_share(actor: Actor, user_id: int, spec: ShareSpec) -> Membership:
    """Give somebody a share of their own. Raises ``Forbidden``, ``NotFound``."""
    actor.require_role(Role.ADMIN)
    with transaction.atomic():
        place = held_place(actor, user_id)
        before = [place.max_templates, place.max_concurrent_sandboxes]
        place.max_templates = spec.max_templates
        place.max_concurrent_sandboxes = spec.max_concurrent_sandboxes
        place.save(update_fields=["max_templates", "max_concurrent_sandboxes"])
        after = [place.max_templates, place.max_concurrent_sandboxes]
        if after != before:
            note(actor, "member.share", place, {"changed": {"shares": [before, after]}})
    return place


@audited("member.remove", "user")
def remove(actor: Actor, user_id: int) -> Departure:
    """Take somebody out of the team: their next request is refused.

    Raises ``Forbidden``, ``NotFound``, and ``Conflict`` for the last owner.
    """
    actor.require_role(Role.ADMIN)
    with transaction.atomic():
        place = held_place(actor, user_id)
        if place.role == Role.OWNER:
            actor.require_role(Role.OWNER)
        return depart(actor, "member.remove", place)


@audited("member.leave", "user")
def leave(actor: Actor) -> Departure:
    """Leave the team. Raises ``NotFound`` for an operator who is not in it, and ``Conflict``."""
    if actor.user is None:
        raise Forbidden("An API token can't leave a team.")
    with transaction.atomic():
        return depart(actor, "member.leave", held_place(actor, actor.user.pk))


def depart(actor: Actor, action: str, place: Membership) -> Departure:
    """End a place in the team, which is locked; invitations are not left behind."""
    require_another_owner(place)
    tokens = ApiToken.objects.filter(team=actor.team, created_by=place.user, revoked_at=None)
    note(actor, action, place, {"role": place.role})
    place.delete()
    return Departure(place.user.get_full_name(), tokens.count(), withdraw(actor, place, None))


def note(actor: Actor, action: str, place: Membership, data: dict[str, Any]) -> None:
    """On record, and open pages look again."""
    user = place.user
    audit.record(actor, action, kind="user", object_id=user.pk, name=user.email, data=data)
    tell(place.team_id)
