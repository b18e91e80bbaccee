"""The browsers a person is signed in with: which there are, and ending them."""

from __future__ import annotations

import time
from contextlib import suppress

from django.conf import settings
from django.contrib.auth import login
from django.contrib.sessions.models import Session
from django.db import transaction
from django.http import HttpRequest
from django.utils import timezone

from orkestr_console.accounts import audit
from orkestr_console.accounts.models import Membership, SignedIn, User
from orkestr_console.accounts.services import session_actor
from orkestr_console.core.channel_layer import notify
from orkestr_console.core.errors import Forbidden, NotFound

# When a session was last used is worth knowing to this many seconds.
SEEN_INTERVAL_SECONDS = 300
SEEN_SESSION_KEY = "seen_at"
MAX_USER_AGENT_LENGTH = 300


def person_group(user_id: int) -> str:
    """The group of a person's open pages."""
    return f"person.{user_id}"


def sign_in(request: HttpRequest, user: User) -> None:
    """Sign ``user`` in with this browser, on record."""
    previous = request.session.session_key
    login(request, user, backend=settings.LOGIN_BACKEND)
    if previous:
        SignedIn.objects.filter(session_key=previous).delete()
    record_session(request, user)
    record_sign_in(user.email, client_address(request), user=user)


def record_session(request: HttpRequest, user: User) -> None:
    """List the request's session among the person's."""
    if request.session.session_key is None:
        request.session.save()
    request.session[SEEN_SESSION_KEY] = int(time.time())
    SignedIn.objects.update_or_create(
        session_key=request.session.session_key,
        defaults={
            "user": user,
            "address": client_address(request),
            "user_agent": request.headers.get("User-Agent", "")[:MAX_USER_AGENT_LENGTH],
            "seen_at": timezone.now(),
        },
    )


def record_sign_in(email: str, address: str, *, user: User | None, error: str = "") -> None:
    """Put a sign-in, or a refused one of somebody we know, on record in each of their teams."""
    person = user or User.objects.filter(email=email.strip().lower()).first()
    if person is None:
        return
    for team_id in Membership.objects.filter(user=person).values_list("team_id", flat=True):
        audit.record_sign_in(person.email, address, team_id, user=user, error=error)


def record_sign_out(request: HttpRequest) -> None:
    """Put on record that the person ends this session, in the team they act for."""
    if isinstance(request.user, User):
        # Whoever is in no team any more has no log to be written in.
        with suppress(Forbidden):
            audit.record(session_actor(request), "session.end", kind="session")


def client_address(request: HttpRequest) -> str:
    """Where the request comes from."""
    return str(request.META.get("REMOTE_ADDR") or "")[:64]


def touch(request: HttpRequest) -> None:
    """Remember that the session is used now, at most every five minutes."""
    now = int(time.time())
    if now - int(request.session.get(SEEN_SESSION_KEY, 0)) >= SEEN_INTERVAL_SECONDS:
        user = request.user
        assert isinstance(user, User)
        record_session(request, user)


def list_sessions(user: User) -> list[SignedIn]:
    """The browsers signed in, the one used last first; what has expired is forgotten."""
    live = Session.objects.filter(expire_date__gt=timezone.now()).values("session_key")
    rows = SignedIn.objects.filter(user=user)
    rows.exclude(session_key__in=live).delete()
    return list(rows.order_by("-seen_at"))


def end_session(user: User, session_id: int) -> None:
    """Sign one browser out. Raises ``NotFound``."""
    row = SignedIn.objects.filter(user=user, pk=session_id).first()
    if row is None:
        raise NotFound("This session has already ended.")
    end_sessions(user, [row.session_key])


def end_other_sessions(user: User, keep_session: str | None) -> int:
    """Sign every other browser out; how many."""
    keys = SignedIn.objects.filter(user=user).exclude(session_key=keep_session or "")
    return end_sessions(user, list(keys.values_list("session_key", flat=True)))


@transaction.atomic
def end_sessions(user: User, keys: list[str]) -> int:
    """End these sessions, and tell the pages that are open in them."""
    Session.objects.filter(session_key__in=keys).delete()
    SignedIn.objects.filter(user=user, session_key__in=keys).delete()
    notify(person_group(user.pk), {"type": "session.ended"})
    return len(keys)


def forget(request: HttpRequest) -> None:
    """The session ends itself: sign-out."""
    SignedIn.objects.filter(session_key=request.session.session_key or "").delete()
