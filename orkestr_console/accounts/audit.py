"""The audit log: who did what to which object, from where, for every write and denied write.

A change is recorded in its own transaction, so neither exists without the other. A denial is
recorded after its transaction has been rolled back: hence the decorator, which is outermost on
every service that writes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import wraps
from inspect import isgeneratorfunction
from typing import Any, Concatenate, cast

from orkestr_console.accounts import audit_spool
from orkestr_console.accounts.actor import Actor
from orkestr_console.accounts.models import AuditEntry, Outcome, User
from orkestr_console.core.errors import Asleep, DomainError, ExecKilled, ExecTimeout
from orkestr_console.core.postgres import persistently
from orkestr_console.core.rows import insert
from orkestr_console.core.text import replace_unstorable

MAX_NAME_LENGTH = 254
MAX_DETAIL_LENGTH = 2000
# From this status on it is a failure of ours, not a refusal.
FIRST_SERVER_ERROR = 500
# Errors of calls that had an effect nevertheless.
ERRORS_AFTER_EFFECT = (ExecKilled, ExecTimeout)


def record(
    actor: Actor,
    action: str,
    *,
    kind: str = "",
    object_id: object = "",
    name: str = "",
    data: dict[str, Any] | None = None,
) -> None:
    """Record that ``actor`` did ``action`` (``"template.create"``), in its transaction.

    ``kind``, ``object_id`` and ``name`` are the object's; ``data`` is JSON without secrets.
    """
    write(actor, action, Outcome.DONE, kind, object_id, name, data=data)


def record_denial(
    actor: Actor, action: str, error: DomainError, *, kind: str = "", object_id: object = ""
) -> None:
    """Record that ``action`` was refused, and why. Call it outside the rolled-back transaction."""
    write(
        actor,
        action,
        Outcome.DONE if isinstance(error, ERRORS_AFTER_EFFECT) else Outcome.DENIED,
        kind,
        object_id,
        code=error.code,
        detail=replace_unstorable(error.detail)[:MAX_DETAIL_LENGTH],
    )


def write(
    actor: Actor,
    action: str,
    outcome: Outcome,
    kind: str = "",
    object_id: object = "",
    name: str = "",
    **rest: Any,
) -> None:
    """Add one entry."""
    insert(entry(actor, action, outcome, kind, object_id, name, **rest))


def entry(
    actor: Actor,
    action: str,
    outcome: Outcome = Outcome.DONE,
    kind: str = "",
    object_id: object = "",
    name: str = "",
    **rest: Any,
) -> AuditEntry:
    """A new entry, for a statement that also changes what it is about."""
    return AuditEntry(
        team_id=actor.team.pk,
        who=actor_identity(actor),
        user_id=actor.user.pk if actor.user else None,
        token=actor.token.prefix if actor.token else "",
        surface=actor.surface,
        address=actor.address or "",
        action=action,
        outcome=outcome,
        object_kind=kind,
        object_id=replace_unstorable(str(object_id))[:64],
        object_name=replace_unstorable(name)[:MAX_NAME_LENGTH],
        **{"data": {}, **{key: value for key, value in rest.items() if value is not None}},
    )


def actor_identity(actor: Actor) -> str:
    """The actor's name in the log."""
    if actor.user:
        return actor.user.email
    return actor.token.name if actor.token else "system"


def actor_description(actor: Actor) -> str:
    """The actor in words for their team: ``Ada Demo``, ``the token 'ci' of Ada Demo``."""
    person = (actor.user.get_full_name() or actor.user.email) if actor.user else ""
    if actor.token is None:
        return person or "the system"
    return f"the token '{actor.token.name}'" + (f" of {person}" if person else "")


@contextmanager
def denials(actor: Actor, action: str, kind: str = "", object_id: object = "") -> Iterator[None]:
    """Record a refusal that propagates out of the block."""
    try:
        yield
    except Asleep:
        # No refusal yet: it is called again.
        raise
    except DomainError as error:
        raised = error
        if isinstance(error, ERRORS_AFTER_EFFECT):
            persistently(
                lambda: record_denial(actor, action, raised, kind=kind, object_id=object_id)
            )
        elif error.status < FIRST_SERVER_ERROR:
            record_denial(actor, action, error, kind=kind, object_id=object_id)
        raise


def audited[**P, R](
    action: str,
    kind: str = "",
    *,
    note: Callable[[Any, Any], dict[str, Any]] | None = None,
    behind: bool = False,
) -> Callable[[Callable[Concatenate[Actor, P], R]], Callable[Concatenate[Actor, P], R]]:
    """Decorate a service that writes: record its refusals.

    With ``note``, also record each success, with the data that ``note`` derives from the result and
    the last argument; a service that changes rows records that itself, in its transaction. If the
    first argument after the actor is a string, it is the object's id. With ``behind``, nobody waits
    until a success is recorded (:mod:`orkestr_console.accounts.audit_spool`). The service can be
    written as steps (:mod:`orkestr_console.core.hosts`).
    """

    audit = Auditing(action, kind, note, behind)

    def decorate(service: Callable[Concatenate[Actor, P], R]) -> Callable[Concatenate[Actor, P], R]:
        @wraps(service)
        def wrapped(actor: Actor, /, *args: P.args, **kwargs: P.kwargs) -> R:
            with audit.denials(actor, args):
                answer = service(actor, *args, **kwargs)
            audit.record_success(actor, args, answer)
            return answer

        @wraps(service)
        def in_steps(actor: Actor, /, *args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
            steps: Any = service(actor, *args, **kwargs)
            with audit.denials(actor, args):
                answer = yield from steps
            audit.record_success(actor, args, answer)
            return answer

        return cast("Any", in_steps) if isgeneratorfunction(service) else wrapped

    return decorate


@dataclass(frozen=True)
class Auditing:
    """What :func:`audited` records of a service."""

    action: str
    kind: str
    note: Callable[[Any, Any], dict[str, Any]] | None
    behind: bool

    def denials(self, actor: Actor, args: tuple[Any, ...]) -> AbstractContextManager[None]:
        """Record a refusal that propagates out of the block."""
        return denials(actor, self.action, self.kind, subject_of(args))

    def record_success(self, actor: Actor, args: tuple[Any, ...], answer: Any) -> None:
        """Record a success, if the service does not."""
        if self.note is None:
            return
        data, subject = self.note(answer, args[-1]), subject_of(args)
        made = entry(actor, self.action, kind=self.kind, object_id=subject, data=data)
        if not (self.behind and audit_spool.keep(made)):
            persistently(lambda: insert(made, flush=not self.behind))


def subject_of(args: tuple[Any, ...]) -> str:
    """The id of the object, if the first argument is one."""
    return args[0] if args and isinstance(args[0], str) else ""


def record_sign_in(
    email: str, address: str, team_id: str, *, user: User | None, error: str = ""
) -> None:
    """Record a sign-in, or why it was refused, for one of the person's teams."""
    AuditEntry.objects.create(
        team_id=team_id,
        who=replace_unstorable(email)[:MAX_NAME_LENGTH],
        user_id=user.pk if user else None,
        surface="console",
        address=address,
        action="session.create",
        outcome=Outcome.DENIED if error else Outcome.DONE,
        detail=error,
        object_kind="session",
    )
