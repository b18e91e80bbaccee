"""The browsers that a person is signed in with: listing and ending sessions."""

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

# A session's last use is stored to this precision.
SEEN_INTERVAL_SECONDS = 300
SEEN_SESSION_KEY = "seen_at"
MAX_USER_AGENT_LENGTH = 300


def person_group(user_id: int) -> str:
    """The channel group of a person's open pages."""
    return f"person.{user_id}"


def sign_in(request: HttpRequest, user: User) -> None:
    """Sign ``user`` in with this browser, and record it."""
    previous = request.session.session_key
    login(request, user, backend=settings.LOGIN_BACKEND)
    if previous:
        SignedIn.objects.filter(session_key=previous).delete()
    record_session(request, user)
    record_sign_in(user.email, client_address(request), user=user)


def record_session(request: HttpRequest, user: User) -> None:
    """Store the request's session in the list of the person's sessions."""
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
    """Record a known person's sign-in, or its refusal, in each of their teams."""
    person = user or User.objects.filter(email=email.strip().lower()).first()
    if person is None:
        return
    for team_id in Membership.objects.filter(user=person).values_list("team_id", flat=True):
        audit.record_sign_in(person.email, address, team_id, user=user, error=error)


def record_sign_out(request: HttpRequest) -> None:
    """Record a sign-out in the team that the person acts for."""
    if isinstance(request.user, User):
        # A person without a team has no log to record it in.
        with suppress(Forbidden):
            audit.record(session_actor(request), "session.end", kind="session")


def client_address(request: HttpRequest) -> str:
    """The request's network address."""
    return str(request.META.get("REMOTE_ADDR") or "")[:64]


def touch(request: HttpRequest) -> None:
    """Record that the session was used now, at most every five minutes."""
    now = int(time.time())
    if now - int(request.session.get(SEEN_SESSION_KEY, 0)) >= SEEN_INTERVAL_SECONDS:
        user = request.user
        assert isinstance(user, User)
        record_session(request, user)


def list_sessions(user: User) -> list[SignedIn]:
    """The signed-in browsers, last used first; deletes expired ones."""
    live = Session.objects.filter(expire_date__gt=timezone.now()).values("session_key")
    rows = SignedIn.objects.filter(user=user)
    rows.exclude(session_key__in=live).delete()
    return list(rows.order_by("-seen_at"))


def end_session(user: User, session_id: int) -> None:
    """Sign out one browser. Raises ``NotFound``."""
    row = SignedIn.objects.filter(user=user, pk=session_id).first()
    if row is None:
        raise NotFound("This session has already ended.")
    end_sessions(user, [row.session_key])


def end_other_sessions(user: User, keep_session: str | None) -> int:
    """Sign out all other browsers; how many."""
    keys = SignedIn.objects.filter(user=user).exclude(session_key=keep_session or "")
    return end_sessions(user, list(keys.values_list("session_key", flat=True)))


@transaction.atomic
def end_sessions(user: User, keys: list[str]) -> int:
    """End these sessions, and notify their open pages."""
    Session.objects.filter(session_key__in=keys).delete()
    SignedIn.objects.filter(user=user, session_key__in=keys).delete()
    notify(person_group(user.pk), {"type": "session.ended"})
    return len(keys)


def forget(request: HttpRequest) -> None:
    """Remove the request's session from the list: it signs out."""
    SignedIn.objects.filter(session_key=request.session.session_key or "").delete()
