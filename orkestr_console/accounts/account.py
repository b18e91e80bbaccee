"""What a person changes about their own account, on record in the team they act for.

No entry holds what was typed as a password or a code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from django.db import transaction

from orkestr_console.accounts import audit, people, second_factor, sessions
from orkestr_console.accounts.actor import Actor
from orkestr_console.accounts.models import User
from orkestr_console.core.errors import Forbidden, InvalidInput
from orkestr_console.core.text import name_problem

WRONG_PASSWORD = "Wrong password."  # noqa: S105 - a sentence
MAX_NAME_LENGTH = 100


@contextmanager
def audited_change(actor: Actor, action: str) -> Iterator[User]:
    """The acting person, in a transaction; refusals go to the audit log."""
    user = actor.user
    if user is None:
        raise Forbidden("An API token has no account.")
    with audit.denials(actor, action, "user", user.pk), transaction.atomic():
        yield user


def record(actor: Actor, action: str, **data: object) -> None:
    """Record in the audit log a change of the person's own account."""
    user = actor.user
    assert user is not None
    audit.record(actor, action, kind="user", object_id=user.pk, name=user.email, data=data)


def require_password(user: User, password: str, field: str) -> None:
    """Raise ``InvalidInput`` unless ``password`` is the person's."""
    if not user.check_password(password):
        raise InvalidInput(WRONG_PASSWORD, fields={field: WRONG_PASSWORD})


def change_name(actor: Actor, name: str) -> None:
    """Change the person's display name. Raises ``InvalidInput``."""
    with audited_change(actor, "account.name") as user:
        problem = name_problem(name)
        if len(name) > MAX_NAME_LENGTH:
            problem = f"Your name has at most {MAX_NAME_LENGTH} characters."
        if problem:
            raise InvalidInput(problem, fields={"name": problem})
        before, user.name = user.name, name
        user.save(update_fields=["name"])
        if before != name:
            record(actor, "account.name", changed={"name": [before, name]})


def change_password(actor: Actor, current: str, password: str, keep_session: str | None) -> None:
    """A new password, which ends every session but ``kept``.

    Raises ``InvalidInput`` for a wrong current one and a weak new one.
    """
    with audited_change(actor, "account.password") as user:
        require_password(user, current, "current")
        people.require_strong(password, user)
        sessions_ended = sessions.end_other_sessions(user, keep_session)
        user.set_password(password)
        user.save(update_fields=["password"])
        record(actor, "account.password", sessions_ended=sessions_ended)


def end_session(actor: Actor, session_id: int) -> None:
    """Sign out one of the person's browsers. Raises ``NotFound``."""
    with audited_change(actor, "session.end") as user:
        sessions.end_session(user, session_id)
        record(actor, "session.end", sessions_ended=1)


def end_other_sessions(actor: Actor, keep_session: str | None) -> int:
    """Sign out all the person's other browsers; how many."""
    with audited_change(actor, "session.end") as user:
        sessions_ended = sessions.end_other_sessions(user, keep_session)
        record(actor, "session.end", sessions_ended=sessions_ended)
    return sessions_ended


def begin_second_factor(actor: Actor) -> None:
    """Create a secret to scan. Raises ``InvalidInput`` if two-step sign-in is already on."""
    with audited_change(actor, "second_factor.begin") as user:
        second_factor.begin(user)
        record(actor, "second_factor.begin")


def confirm_second_factor(actor: Actor, code: str) -> list[str]:
    """Turn it on with a first code; returns the recovery codes. Raises ``InvalidInput``."""
    with audited_change(actor, "second_factor.on") as user:
        codes = second_factor.confirm(user, code)
        record(actor, "second_factor.on")
    return codes


def turn_off_second_factor(actor: Actor, password: str) -> None:
    """Turn it off, given the password. Raises ``InvalidInput``."""
    with audited_change(actor, "second_factor.off") as user:
        require_password(user, password, "off")
        second_factor.turn_off(user)
        record(actor, "second_factor.off")
