"""Agreeing with the host that its state belongs to this database, and the quarantine.

No database connection is held during calls to the host: :func:`agree` writes its new mark, commits,
and only then sends it to the host.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from django.db import transaction
from django.db.models import F, Max
from django.utils import timezone

from hostruntime.errors import HostError
from hostruntime.host.installation import InstallationMismatch, InstallationStore, StateUnclaimed
from hostruntime.host.paths import StatePaths
from hostruntime.wire.health import CapacityStatus
from hostruntime.wire.reconciliation import (
    InstallationInfo,
    QuarantinedItemInfo,
    Reconcile,
    Reconciliation,
)
from orkestr_console.accounts import audit
from orkestr_console.accounts.limit_changes import Operator, record_refusals
from orkestr_console.core.hosts import host, translated_errors
from orkestr_console.core.postgres import release_connection
from orkestr_console.installation.models import Installation, new_word

logger = logging.getLogger(__name__)

# Long enough for a change of the mark, which takes two calls.
MAX_TRIES = 20
PAUSE_SECONDS = 0.5
# A page that shows it among others doesn't wait longer.
CAPACITY_TIMEOUT = 2.0


def current() -> Installation:
    """The row, created at first use."""
    return Installation.objects.get_or_create(only=True)[0]


def is_mismatched() -> bool:
    """Whether database and state directory are known not to belong together."""
    return bool(current().mismatch)


def agree(has_known_objects: Callable[[], bool]) -> bool:
    """Whether the host's state belongs to this database; both then have the same new mark.

    ``knows_some`` is asked, of a state that no database has claimed, whether a row names anything
    of what is in it. Raises the host's errors when it does not answer.
    """
    row = advance_mark(current())
    release_connection()
    try:
        host().agree(row.claim())
    except StateUnclaimed:
        known = has_known_objects()
        release_connection()
        try:
            host().agree(row.claim(), known=known)
        except InstallationMismatch as error:
            return record_mismatch(error.detail)
    except InstallationMismatch as error:
        return record_mismatch(error.detail)
    Installation.objects.filter(pk=row.pk, mark=row.mark).update(
        confirmed=True, mismatch="", mismatch_at=None
    )
    return True


def advance_mark(row: Installation) -> Installation:
    """The row with a new mark, unless the host has not confirmed the last one yet."""
    if row.confirmed:
        Installation.objects.filter(pk=row.pk, mark=row.mark).update(
            epoch=F("epoch") + 1, previous=row.mark, mark=new_word(), confirmed=False
        )
        row.refresh_from_db()
    return row


def record_mismatch(reason: str) -> bool:
    """Record that nothing may be reconciled, and why; returns False."""
    logger.error("nothing is reconciled with the host: %s", reason)
    Installation.objects.exclude(mismatch=reason).update(
        mismatch=reason, mismatch_at=timezone.now()
    )
    return False


def reconcile(
    *, images: Sequence[str] | None = None, snapshots: Sequence[str] | None = None
) -> Reconciliation | None:
    """Have the host quarantine some of what has no row; None if it must not.

    Waits briefly while another task changes the mark. Raises the host's errors if it doesn't
    answer.
    """
    for _ in range(MAX_TRIES):
        row = current()
        if row.mismatch:
            return None
        release_connection()
        if row.confirmed:
            try:
                result = host().reconcile(Reconcile(row.claim(), images, snapshots))
            except InstallationMismatch as error:
                logger.warning("the host set nothing aside: %s", error.detail)
            else:
                if result.set_aside:
                    logger.error("set aside, as no row names them: %s", ", ".join(result.set_aside))
                return result
        pause()
    return None


def pause() -> None:
    """Wait for the other task."""
    time.sleep(PAUSE_SECONDS)


def record_waiting(count: int) -> None:
    """Record how many more items will be quarantined."""
    Installation.objects.exclude(waiting=count).update(waiting=count)


# The operator's ---------------------------------------------------------------------------------


def adopt(operator: Operator | None = None) -> Installation:
    """Have an operator confirm that database and state belong together from now on.

    What has no row is then quarantined, a few items at a time. Raises ``HostUnavailable``.
    """
    with translated_errors():
        standing = host().installation()
    with transaction.atomic():
        row = new_mark(standing.epoch)
        if operator is not None:
            record(operator, "installation.adopt", row.pk, standing.mismatch)
    with translated_errors():
        host().adopt(row.claim())
    return confirm(row)


def adopt_restored(paths: StatePaths) -> Installation:
    """:func:`adopt` for a state directory restored with the database; no host is running yet.

    Raises ``OSError``.
    """
    row = new_mark(0)
    InstallationStore(paths).adopt(row.claim())
    return confirm(row)


def new_mark(seen: int) -> Installation:
    """The row with a mark without a predecessor, and an epoch after the last one ``seen``."""
    last_epoch = Installation.objects.aggregate(most=Max("epoch"))["most"] or 0
    row = current()
    row.epoch, row.previous, row.mark = max(last_epoch, seen) + 1, "", new_word()
    row.confirmed = False
    row.save()
    return row


def confirm(row: Installation) -> Installation:
    """The row, marked as confirmed by the host."""
    row.confirmed, row.mismatch, row.mismatch_at = True, "", None
    row.save()
    return row


def host_standing() -> InstallationInfo:
    """The state directory's own record. Raises ``HostUnavailable``."""
    with translated_errors():
        return host().installation()


def capacity() -> CapacityStatus | None:
    """What sandboxes and builds are promised of the machine; None if the host doesn't answer."""
    release_connection()
    try:
        return host().health(seconds=CAPACITY_TIMEOUT).capacity
    except HostError:
        return None


def list_quarantine() -> list[QuarantinedItemInfo]:
    """The items in quarantine, oldest first. Raises ``HostUnavailable``."""
    release_connection()
    with translated_errors():
        return host().quarantine()


def restore(key: str, operator: Operator | None = None) -> QuarantinedItemInfo:
    """Restore an item from quarantine. Raises ``NotFound``, ``Conflict``, ``HostUnavailable``."""
    with record_refusals_of(operator, "quarantine.restore", key), translated_errors():
        item = host().restore_quarantined(key)
    if operator is not None:
        record(operator, "quarantine.restore", item.name, item.kind)
    return item


def delete(key: str, operator: Operator | None = None) -> None:
    """Delete a quarantined item permanently. Raises ``NotFound``, ``HostUnavailable``."""
    with record_refusals_of(operator, "quarantine.delete", key), translated_errors():
        host().delete_quarantined(key)
    if operator is not None:
        record(operator, "quarantine.delete", key, "")


@contextmanager
def record_refusals_of(operator: Operator | None, action: str, key: str) -> Iterator[None]:
    """Record an operator's refused action in the audit log."""
    if operator is None:
        yield
        return
    with record_refusals(operator, action, "host", key):
        yield


def record(operator: Operator, action: str, name: str, note: str) -> None:
    """Record an operator's action in the audit log of the team they currently act for."""
    if operator.home is not None:
        actor, data = operator.acting_for(operator.home), {"note": note} if note else {}
        audit.record(actor, action, kind="host", object_id=name, name=name, data=data)
