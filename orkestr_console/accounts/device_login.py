"""Signing a program in with a browser on any device: OAuth's device authorization (RFC 8628).

The program asks for two codes. It keeps one to itself, and shows the person a link and the other.
Somebody who is signed in here compares that code with the one in front of them and approves or
denies; meanwhile the program asks every few seconds, and gets an API token once.

What the person sees of the program is what it says of itself, so nothing here trusts that: an
attacker can start a login and send somebody the link (RFC 8628, 5.4). The page says so, shows where
the request came from, and never approves by a link alone.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Literal

from django.db import transaction
from django.db.models import Count, Min
from django.utils import timezone
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from orkestr_console.accounts import audit, tokens
from orkestr_console.accounts.actor import EVERYTHING, READ, WRITE, Actor
from orkestr_console.accounts.api_tokens import MAX_DAYS, record_created
from orkestr_console.accounts.models import (
    ApiToken,
    AuditEntry,
    DeviceLogin,
    Outcome,
    Role,
    TokenOrigin,
)
from orkestr_console.accounts.services import mint_token, user_actor
from orkestr_console.core.errors import Conflict, Forbidden, InvalidInput, RateLimited
from orkestr_console.core.text import readable

LIFETIME = timedelta(minutes=10)
# Seconds between two polls, and how many more after one that came too early (RFC 8628, 3.5).
INTERVAL = 5
SLOWER_BY = 5
MAX_INTERVAL = 60
# A network that delays a poll must not make the next one count as early.
TOLERANCE = timedelta(seconds=1)
# Letters that look like no others and spell no words (RFC 8628, 6.1): 20^8 codes.
ALPHABET = "BCDFGHJKLMNPQRSTVWXZ"
CODE_LENGTH = 8
# Whoever has no token yet may ask for a login: so many from one place, and so many in all, past
# which each makes room.
MAX_OPEN_OF_SOURCE = 30
MAX_OPEN = 5000
IPV6_NETWORK = 64
# The codes that a person may get wrong in a while.
MAX_WRONG = 10
WRONG_FOR = timedelta(minutes=10)
FIND, APPROVE, DENY = "device.find", "device.approve", "device.deny"
ACCESS: dict[str, list[str]] = {"read": [READ], "write": [READ, WRITE], "everything": [EVERYTHING]}

type PollError = Literal["authorization_pending", "slow_down", "expired_token", "access_denied"]

POLL_DETAILS: dict[PollError, str] = {
    "authorization_pending": "Nobody has answered this login request yet.",
    "slow_down": "You ask too often; wait longer between two requests.",
    "expired_token": "This login request is unknown, was used, or has expired; start another one.",
    "access_denied": "This login request was denied.",
}


class DeviceStartSpec(BaseModel):
    """A program that wants to be signed in, as it calls itself."""

    model_config = ConfigDict(strict=True, extra="forbid", str_strip_whitespace=True)

    client_name: Annotated[str, Field(min_length=1, max_length=100), AfterValidator(readable)]


class DevicePollSpec(BaseModel):
    """The code that the program kept to itself."""

    model_config = ConfigDict(strict=True, extra="forbid")

    device_code: Annotated[str, Field(min_length=1, max_length=200)]


class DeviceApprovalSpec(BaseModel):
    """The login to approve, and what its token may do for how long; None is no expiry."""

    model_config = ConfigDict(extra="forbid")

    code: str
    access: Literal["read", "write", "everything"]
    days: Annotated[int, Field(ge=1, le=MAX_DAYS)] | None = None


@dataclass(frozen=True)
class StartedLogin:
    """A new login's codes, which cannot be retrieved again."""

    device_code: str
    user_code: str


@dataclass(frozen=True)
class SignedIn:
    """A login that was approved: its token's text is only here."""

    token: ApiToken
    text: str


def start(spec: DeviceStartSpec, address: str) -> StartedLogin:
    """Start a login for a program at network address ``address``. Raises ``RateLimited``."""
    now = timezone.now()
    DeviceLogin.objects.filter(expires_at__lte=now).delete()
    source = counted_source(address)
    make_room(source)
    started = StartedLogin(secrets.token_urlsafe(32), new_user_code())
    DeviceLogin.objects.create(
        device_digest=tokens.digest(started.device_code),
        user_digest=tokens.digest(started.user_code),
        client_name=spec.client_name,
        address=address,
        source=source,
        created_at=now,
        expires_at=now + LIFETIME,
        interval=INTERVAL,
    )
    return started


def counted_source(address: str) -> str:
    """What is counted as one place: an address, or the network that an IPv6 address is in."""
    with suppress(ValueError):
        if ipaddress.ip_address(address).version == 6:
            return str(ipaddress.ip_network((address, IPV6_NETWORK), strict=False))
    return address


def make_room(source: str) -> None:
    """Raise ``RateLimited`` if one place has too many logins that nobody has finished.

    If all have too many together, the oldest that nobody has answered goes, of those of the place
    that has most: whoever fills them up loses their own, and keeps nobody out.
    """
    unfinished = DeviceLogin.objects.filter(redeemed_at=None)
    if unfinished.filter(source=source).count() >= MAX_OPEN_OF_SOURCE:
        raise RateLimited(
            "Too many login requests are open; finish one of them, or try again in ten minutes.",
            retry_after=int(LIFETIME.total_seconds()),
        )
    unanswered = unfinished.filter(answered_at=None)
    for _ in range(unfinished.count() - MAX_OPEN + 1):
        sources = unanswered.values("source").annotate(many=Count("pk"), since=Min("created_at"))
        most = sources.order_by("-many", "since").first()
        if most is None:
            return
        oldest = unanswered.filter(source=most["source"]).order_by("created_at").first()
        if oldest is not None:
            # Unless somebody answers it just now.
            unanswered.filter(pk=oldest.pk).delete()


def new_user_code() -> str:
    """A code that is easy to read and type: ``BCDF-GHJK``."""
    letters = "".join(secrets.choice(ALPHABET) for _ in range(CODE_LENGTH))
    return shown(letters)


def shown(letters: str) -> str:
    """A user code's letters as they are shown."""
    half = CODE_LENGTH // 2
    return f"{letters[:half]}-{letters[half:]}"


def normalized(typed: str) -> str:
    """A user code as it is shown, however it was typed: any case, any or no separators."""
    return shown("".join(letter for letter in typed.upper() if letter in ALPHABET))


# Polling ----------------------------------------------------------------------------------------


def poll(spec: DevicePollSpec, address: str) -> SignedIn | PollError:
    """The token of an approved login, once; else why there is none (yet)."""
    with transaction.atomic():
        login = locked(device_digest=tokens.digest(spec.device_code))
        if login is None or login.redeemed_at is not None:
            return "expired_token"
        if login.answered_at is None:
            return pace(login)
        actor = approver(login, address)
        if actor is None:
            return "access_denied"
        return redeem(login, actor)


def locked(**digest: str) -> DeviceLogin | None:
    """The login with this digest, unless it has expired; in a transaction."""
    rows = DeviceLogin.objects.select_for_update(of=("self",)).select_related("user")
    return rows.filter(expires_at__gt=timezone.now(), **digest).first()


def pace(login: DeviceLogin) -> PollError:
    """Record a poll that was too early to be answered; those in too short an interval slow down."""
    now, before = timezone.now(), login.polled_at
    hasty = before is not None and now - before + TOLERANCE < timedelta(seconds=login.interval)
    if hasty:
        login.interval = min(login.interval + SLOWER_BY, MAX_INTERVAL)
    login.polled_at = now
    login.save(update_fields=["interval", "polled_at"])
    return "slow_down" if hasty else "authorization_pending"


def approver(login: DeviceLogin, address: str) -> Actor | None:
    """Who approved, if they may still create tokens of the team; None also for a refusal."""
    user = login.user
    if user is None or not login.scopes or not user.is_active:
        return None
    try:
        actor = user_actor(user, login.team_id, address)
    except Forbidden:
        return None
    return actor if actor.team.pk == login.team_id and actor.is_at_least(Role.ADMIN) else None


def redeem(login: DeviceLogin, actor: Actor) -> SignedIn:
    """Create the token that was approved; the login is used up."""
    now = timezone.now()
    login.redeemed_at = now
    login.save(update_fields=["redeemed_at"])
    token, text = mint_token(
        actor.team,
        login.client_name,
        login.scopes,
        created_by=actor.user,
        expires_at=now + timedelta(days=login.days) if login.days else None,
    )
    TokenOrigin.objects.create(token=token, client_name=login.client_name)
    record_created(actor, token, device_login=login.pk)
    return SignedIn(token, text)


# Answering --------------------------------------------------------------------------------------


def find(actor: Actor, typed: str) -> DeviceLogin:
    """The login with this user code that waits for an answer.

    Raises ``InvalidInput`` (in the audit log) for a code that none has, ``RateLimited`` after too
    many of those, and ``Conflict`` for a login that was answered already.
    """
    require_patience(actor)
    code = normalized(typed)
    with audit.denials(actor, FIND, "device"):
        rows = DeviceLogin.objects.filter(expires_at__gt=timezone.now())
        login = rows.filter(user_digest=tokens.digest(code)).first()
        if login is None or not hmac.compare_digest(tokens.digest(code), login.user_digest):
            sentence = (
                "belongs to no login request that is open. Compare it with the one that your "
                "terminal shows; it may also have expired, so start the login again."
            )
            raise InvalidInput(f"This code {sentence}", fields={"code": sentence})
    if login.answered_at is not None:
        raise Conflict("This login request was already answered. Start another one if you need to.")
    return login


def require_patience(actor: Actor) -> None:
    """Raise ``RateLimited`` if the person has just tried too many codes."""
    assert actor.user is not None
    wrong = AuditEntry.objects.filter(
        team_id=actor.team.pk,
        action=FIND,
        outcome=Outcome.DENIED,
        user_id=actor.user.pk,
        at__gt=timezone.now() - WRONG_FOR,
    )
    if wrong.count() >= MAX_WRONG:
        raise RateLimited(
            "Too many wrong codes; try again in ten minutes.",
            retry_after=int(WRONG_FOR.total_seconds()),
        )


def approve(actor: Actor, spec: DeviceApprovalSpec) -> DeviceLogin:
    """Let the program have a token of the team that the person acts for.

    Raises like :func:`find`, and ``Forbidden`` for a member.
    """
    with audit.denials(actor, APPROVE, "device"):
        actor.require_role(Role.ADMIN)
    return answer(actor, spec.code, APPROVE, ACCESS[spec.access], spec.days)


def deny(actor: Actor, code: str) -> DeviceLogin:
    """Tell the program that it gets nothing. Raises like :func:`find`."""
    return answer(actor, code, DENY, [], None)


def answer(
    actor: Actor, code: str, action: str, scopes: list[str], days: int | None
) -> DeviceLogin:
    """Record the answer, of which there is only one."""
    found = find(actor, code)
    with transaction.atomic():
        login = locked(user_digest=found.user_digest)
        if login is None or login.answered_at is not None:
            raise Conflict("This login request has just expired or was just answered.")
        login.answered_at = timezone.now()
        login.user, login.team = actor.user, actor.team
        login.scopes, login.days = scopes, days
        login.save(update_fields=["answered_at", "user", "team", "scopes", "days"])
        data = {"from": login.address, "scopes": scopes, "days": days}
        audit.record(
            actor, action, kind="device", object_id=login.pk, name=login.client_name, data=data
        )
    return login
