"""Agreeing with the host on whose its state is, and what may be set aside for that.

No connection to the database is held while the host is asked: :func:`agree` writes its new mark,
commits, and only then tells the host of it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from django.db import transaction
from django.db.models import F, Max
from django.utils import timezone

from hostruntime.host.installation import InstallationMismatch, InstallationStore, StateUnclaimed
from hostruntime.host.paths import StatePaths
from hostruntime.wire.reconciliation import (
    InstallationInfo,
    QuarantinedItemInfo,
    Reconcile,
    Reconciliation,
)
from orkestr_console.accounts import audit
from orkestr_console.accounts.limit_changes import Operator, refusals
from orkestr_console.core.hosts import errors_told, host
from orkestr_console.core.postgres import let_go
from orkestr_console.installation.models import Installation, new_word

logger = logging.getLogger(__name__)

# For as long as the mark is being changed, which takes two calls.
TRIES = 20
PAUSE_SECONDS = 0.5


def current() -> Installation:
    """The row, made the first time anybody asks."""
    return Installation.objects.get_or_create(only=True)[0]


def is_apart() -> bool:
    """Whether database and state are known not to belong together."""
    return bool(current().mismatch)


def agree(knows_some: Callable[[], bool]) -> bool:
    """Whether the host's state is this database's, by a new mark that both then have.

    ``knows_some`` is asked, of a state that no database has claimed, whether a row names anything
    of what is in it. Raises the host's errors when it does not answer.
    """
    row = advanced(current())
    let_go()
    try:
        host().agree(row.claim())
    except StateUnclaimed:
        known = knows_some()
        let_go()
        try:
            host().agree(row.claim(), known=known)
        except InstallationMismatch as error:
            return apart(error.detail)
    except InstallationMismatch as error:
        return apart(error.detail)
    Installation.objects.filter(pk=row.pk, mark=row.mark).update(
        confirmed=True, mismatch="", mismatch_at=None
    )
    return True


def advanced(row: Installation) -> Installation:
    """The row with a new mark, unless the host has not taken down the last one yet."""
    if row.confirmed:
        Installation.objects.filter(pk=row.pk, mark=row.mark).update(
            epoch=F("epoch") + 1, previous=row.mark, mark=new_word(), confirmed=False
        )
        row.refresh_from_db()
    return row


def apart(why: str) -> bool:
    """Note that nothing may be reconciled, and why; False."""
    logger.error("nothing is reconciled with the host: %s", why)
    Installation.objects.exclude(mismatch=why).update(mismatch=why, mismatch_at=timezone.now())
    return False


def reconcile(
    *, images: Sequence[str] | None = None, snapshots: Sequence[str] | None = None
) -> Reconciliation | None:
    """Have the host set aside some of what is not named; None when it may not.

    Waits a little while another task changes the mark. Raises the host's errors when it does not
    answer.
    """
    for _ in range(TRIES):
        row = current()
        if row.mismatch:
            return None
        let_go()
        if row.confirmed:
            try:
                done = host().reconcile(Reconcile(row.claim(), images, snapshots))
            except InstallationMismatch as error:
                logger.warning("the host set nothing aside: %s", error.detail)
            else:
                if done.set_aside:
                    logger.error("set aside, as no row names them: %s", ", ".join(done.set_aside))
                return done
        pause()
    return None


def pause() -> None:
    """Let the other task go on."""
    time.sleep(PAUSE_SECONDS)


def note_waiting(many: int) -> None:
    """How much more there is to be set aside."""
    Installation.objects.exclude(waiting=many).update(waiting=many)


# The operator's ---------------------------------------------------------------------------------


def adopt(operator: Operator | None = None) -> Installation:
    """An operator's word that database and state belong together from now on.

    What no row names is then set aside, a few things at a time. Raises ``HostUnavailable``.
    """
    with errors_told():
        seen = host().installation()
    with transaction.atomic():
        row = marked_anew(seen.epoch)
        if operator is not None:
            record(operator, "installation.adopt", row.pk, seen.mismatch)
    with errors_told():
        host().adopt(row.claim())
    return confirmed(row)


def adopt_restored(paths: StatePaths) -> Installation:
    """:func:`adopt`, of a state directory that was restored with the database; no host runs yet.

    Raises ``OSError``.
    """
    row = marked_anew(0)
    InstallationStore(paths).adopt(row.claim())
    return confirmed(row)


def marked_anew(seen: int) -> Installation:
    """The row with a mark that follows on no other, later than the epoch that was seen."""
    most = Installation.objects.aggregate(most=Max("epoch"))["most"] or 0
    row = current()
    row.epoch, row.previous, row.mark = max(most, seen) + 1, "", new_word()
    row.confirmed = False
    row.save()
    return row


def confirmed(row: Installation) -> Installation:
    """The row, now that the host has taken down its mark."""
    row.confirmed, row.mismatch, row.mismatch_at = True, "", None
    row.save()
    return row


def standing() -> InstallationInfo:
    """What the state directory says of itself. Raises ``HostUnavailable``."""
    with errors_told():
        return host().installation()


def held() -> list[QuarantinedItemInfo]:
    """What was set aside, the oldest first. Raises ``HostUnavailable``."""
    let_go()
    with errors_told():
        return host().quarantine()


def restore(key: str, operator: Operator | None = None) -> QuarantinedItemInfo:
    """Put back what was set aside. Raises ``NotFound``, ``Conflict``, ``HostUnavailable``."""
    with noting(operator, "quarantine.restore", key), errors_told():
        thing = host().restore_quarantined(key)
    if operator is not None:
        record(operator, "quarantine.restore", thing.name, thing.kind)
    return thing


def delete(key: str, operator: Operator | None = None) -> None:
    """Delete for good what was set aside. Raises ``NotFound``, ``HostUnavailable``."""
    with noting(operator, "quarantine.delete", key), errors_told():
        host().delete_quarantined(key)
    if operator is not None:
        record(operator, "quarantine.delete", key, "")


@contextmanager
def noting(operator: Operator | None, action: str, key: str) -> Iterator[None]:
    """Note in the audit log what an operator is refused."""
    if operator is None:
        yield
        return
    with refusals(operator, action, "host", key):
        yield


def record(operator: Operator, action: str, name: str, note: str) -> None:
    """An entry in the audit log, of the team that the operator acts for just now."""
    if operator.home is not None:
        actor, data = operator.of(operator.home), {"note": note} if note else {}
        audit.record(actor, action, kind="host", object_id=name, name=name, data=data)
