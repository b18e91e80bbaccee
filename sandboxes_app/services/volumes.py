"""Volumes: creating, reading, changing and deleting them, and giving one to a sandbox.

Rows are created here, files by the host with a volume's first sandbox. A sandbox takes a volume in
the transaction that inserts its own row, under the team's lock: so of two that want the same, one
gets it. The host refuses a volume that still has another sandbox, whatever the rows say.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta

from django.conf import settings
from django.db import transaction
from django.db.models import Count, Exists, OuterRef, Sum
from django.utils import timezone

from hostruntime import errors as host_errors
from hostruntime.client.host_client import HostClient
from hostruntime.wire.volumes import AttachVolume
from orkestr_console.accounts import audit
from orkestr_console.accounts.actor import READ, WRITE, Actor
from orkestr_console.accounts.audit import audited
from orkestr_console.accounts.limits import Envelope, held, held_in_turn, wait_for_turn
from orkestr_console.accounts.models import Team
from orkestr_console.core.errors import (
    Conflict,
    DomainError,
    HostUnavailable,
    InvalidInput,
    NotFound,
)
from orkestr_console.core.hosts import Steps, ask, host, in_steps
from orkestr_console.core.ids import is_id
from orkestr_console.core.postgres import persistently
from orkestr_console.http.json_api import timestamp
from orkestr_console.installation import services as installation
from orkestr_console.webhooks import outbox
from orkestr_console.webhooks.models import EventType
from sandboxes_app.models import Sandbox, Volume, VolumeQuerySet
from sandboxes_app.services.lifecycle import SETTLED, settle_if_missing
from sandboxes_app.specs import DEFAULT_SIZE_MB, LifetimeSpec, RegionSpec, VolumeSpec

logger = logging.getLogger(__name__)

NOT_FOUND = "There is no such volume in your team; check the id."
LOST = (
    "The host no longer has the data of the volume '{name}'. Ask your operator to restore it from "
    "a backup; or delete the volume, and use another."
)
DAMAGED = (
    "The file system of the volume '{name}' is damaged and could not be repaired automatically. "
    "Nothing of it was changed: ask your operator to check it, or to restore it from a backup."
)
IN_USE = "The volume '{name}' is in use by the sandbox {holder}; terminate that first."
ENDING = "The volume '{name}' is still in use by a sandbox that is ending; try again in a moment."
VOLUME = "volume_in_use"


@dataclass(frozen=True)
class Claim:
    """A volume that a new sandbox gets, and whether it exists only since then."""

    volume: Volume
    made: bool = False

    def request(self) -> AttachVolume:
        """What the host is told."""
        return AttachVolume(self.volume.pk, self.volume.size_mb, new=not self.volume.stored)


# Reading -----------------------------------------------------------------------------------------


def list_volumes(actor: Actor) -> list[Volume]:
    """All of the team's volumes, newest first."""
    actor.require(READ)
    rows = Volume.objects.for_team(actor.team).with_holders()
    return list(rows.order_by("-created_at", "-id"))


def get_volume(actor: Actor, volume_id: str) -> Volume:
    """One of the team's volumes. Raises ``NotFound``."""
    actor.require(READ)
    return find(actor, volume_id)


def find(actor: Actor, volume_id: str) -> Volume:
    """The row, with its holder. Raises ``NotFound``."""
    if is_id("vol", volume_id):
        rows = Volume.objects.for_team(actor.team).with_holders()
        if (volume := rows.filter(pk=volume_id).first()) is not None:
            return volume
    raise NotFound(NOT_FOUND)


def usage_counts(teams: Collection[Team]) -> dict[str, dict[str, int]]:
    """Each team's usage of the limits on volumes, by team id and limit."""
    rows = Volume.objects.filter(team__in=teams, deleted_at=None).values("team")
    used = {
        row["team"]: {"max_volumes": row["many"], "volume_disk_mb": row["size"]}
        for row in rows.annotate(many=Count("pk"), size=Sum("size_mb"))
    }
    none = {"max_volumes": 0, "volume_disk_mb": 0}
    return {team.pk: used.get(team.pk, none) for team in teams}


# Changing ----------------------------------------------------------------------------------------


@audited("volume.create", "volume")
def create_volume(actor: Actor, spec: VolumeSpec) -> Volume:
    """Create a volume; it takes no space before its first sandbox.

    Raises ``Conflict`` (the name is taken), ``PlanLimit``, ``InvalidInput`` (the region).
    """
    actor.require(WRITE)
    require_region(spec.region)
    with held(actor.team, actor.user) as limits:
        if Volume.objects.for_team(limits.team).filter(name=spec.name).exists():
            raise Conflict(
                f"Your team has a volume called '{spec.name}' already; use it, or another name.",
                code="volume_exists",
            )
        volume = insert(actor, limits, spec.name, spec.size_mb)
        set_lifetime(volume, spec.max_lifetime_days, spec.max_lifetime_hours)
        volume.save(update_fields=["max_lifetime_days", "max_lifetime_hours", "expires_at"])
    return volume


def insert(actor: Actor, limits: Envelope, name: str, size_mb: int) -> Volume:
    """Insert the row, counted against the plan under the team's lock. Raises ``PlanLimit``."""
    used = usage_counts([limits.team])[limits.team.pk]
    limits.require_room("max_volumes", used["max_volumes"])
    limits.require_amount("volume_disk_mb", used["volume_disk_mb"], size_mb)
    volume = Volume.objects.create(
        team=limits.team,
        created_by=actor.user,
        name=name,
        size_mb=size_mb,
        region=settings.REGION,
    )
    record(actor, "volume.create", volume, size_mb=size_mb)
    return volume


def record(actor: Actor, action: str, volume: Volume, **data: object) -> None:
    """Add a change to the audit log, in its transaction."""
    audit.record(
        actor, action, kind="volume", object_id=volume.pk, name=volume.name, data=dict(data)
    )


def set_lifetime(volume: Volume, days: int | None, hours: int | None) -> None:
    """Set or clear when it expires, which counts from its creation."""
    volume.max_lifetime_days, volume.max_lifetime_hours = days, hours
    lifetime = timedelta(days=days or 0, hours=hours or 0)
    volume.expires_at = volume.created_at + lifetime if lifetime else None


@audited("volume.update", "volume")
def update_volume(actor: Actor, volume_id: str, spec: LifetimeSpec) -> Volume:
    """Change when a volume expires. Raises ``NotFound``."""
    actor.require(WRITE)
    with transaction.atomic():
        volume = find(actor, volume_id)
        set_lifetime(volume, spec.max_lifetime_days, spec.max_lifetime_hours)
        fields = ["max_lifetime_days", "max_lifetime_hours", "expires_at"]
        changed = {name: getattr(volume, name) for name in fields}
        # Not save(): a deleted one stays as it is.
        if not Volume.objects.filter(pk=volume.pk, deleted_at=None).update(**changed):
            raise NotFound(NOT_FOUND)
        record(actor, "volume.update", volume, expires_at=timestamp(volume.expires_at))
    return volume


def move_volume(actor: Actor, volume_id: str, spec: RegionSpec) -> Volume:
    """Move a volume to a region. A server has one, so this checks the request and moves nothing.

    Raises ``NotFound``, ``InvalidInput`` (no such region), ``Conflict`` (it is in use).
    """
    actor.require(WRITE)
    volume = find(actor, volume_id)
    require_region(spec.region)
    if volume.holder is not None:
        raise in_use(volume, volume.holder)
    return volume


def require_region(region: str | None) -> None:
    """Raise ``InvalidInput`` for a region that this server is not in."""
    if region not in {None, settings.REGION}:
        sentence = f"is not a region of this server; there is {settings.REGION!r}."
        raise InvalidInput(f"region: {sentence}", fields={"region": sentence})


@in_steps
@audited("volume.delete", "volume")
def delete_volume(actor: Actor, volume_id: str) -> Steps[None]:
    """Delete a volume with all that is on it; deleting it again is no error.

    Raises ``NotFound``, ``Conflict`` (a sandbox has it).
    """
    actor.require(WRITE)
    rows = Volume.objects.filter(team=actor.team, pk=volume_id)
    volume = rows.first() if is_id("vol", volume_id) else None
    if volume is None:
        raise NotFound(NOT_FOUND)
    if volume.deleted_at is not None:
        return
    yield from settle_holder(volume)
    yield from wait_for_turn(actor.team)
    # Nobody can take it while the team's row is locked.
    with held_in_turn(actor.team):
        require_free(volume)
        deleted = rows.filter(deleted_at=None).update(deleted_at=timezone.now())
        if deleted:
            record(actor, "volume.delete", volume, used_bytes=volume.used_bytes)
    if deleted:
        yield from release.steps(volume.pk)


@in_steps
def release(volume_id: str) -> Steps[None]:
    """Delete it on the host now, or leave that to the reconcile pass."""
    try:
        yield from ask(HostClient.delete_volume, volume_id)
    except host_errors.HostError as error:
        logger.warning("could not delete volume %s yet: %s", volume_id, error.detail)


# For a sandbox -----------------------------------------------------------------------------------


def settle_wanted(actor: Actor, reference: str | None) -> Steps[None]:
    """What precedes :func:`claim`, which must not wait for the host: its holder may have ended."""
    if reference is None:
        return
    volume = named(actor.team, reference).first()
    if volume is not None:
        yield from settle_holder(volume)


def settle_holder(volume: Volume) -> Steps[None]:
    """Settle the row of the sandbox that has the volume, if the host has ended it."""
    holder = Sandbox.objects.filter(volume=volume, status__in=SETTLED).first()
    if holder is not None:
        try:
            yield from settle_if_missing.steps(holder)
        except HostUnavailable:
            logger.warning("could not check sandbox %s: the host does not answer", holder.pk)


def named(team: Team, reference: str) -> VolumeQuerySet:
    """The team's volume of a name or an id."""
    rows = Volume.objects.for_team(team)
    return rows.filter(pk=reference) if is_id("vol", reference) else rows.filter(name=reference)


def claim(actor: Actor, limits: Envelope, reference: str | None) -> Claim | None:
    """The volume of a sandbox whose row is inserted in this transaction, created if need be.

    The caller holds the team's lock. Raises ``NotFound`` for an id that the team does not have,
    ``Conflict`` (it is in use, or lost), ``PlanLimit``.
    """
    if reference is None:
        return None
    volume = named(limits.team, reference).first()
    if volume is not None:
        require_free(volume)
        return Claim(volume)
    if is_id("vol", reference):
        raise NotFound(NOT_FOUND, fields={"volume": NOT_FOUND})
    return Claim(insert(actor, limits, reference, DEFAULT_SIZE_MB), made=True)


def require_free(volume: Volume) -> None:
    """Raise ``Conflict`` if a sandbox has the volume, or is ending and may have it still."""
    had = Sandbox.objects.filter(volume=volume)
    # Each by an index that has nothing of those that ended long ago.
    if (holder := had.live().first()) is not None:
        raise in_use(volume, holder.pk)
    if had.exclude(driver="").exists():
        raise Conflict(ENDING.format(name=volume.name), code=VOLUME)


def in_use(volume: Volume, holder: str) -> Conflict:
    """The error for a volume that a live sandbox has."""
    detail = IN_USE.format(name=volume.name, holder=holder)
    return Conflict(detail, code=VOLUME, extra={"sandbox_id": holder})


def mark_stored(volume: Volume, node_id: str) -> None:
    """Its first sandbox runs: the host has it from now on, and must never create it again."""
    if not volume.stored or volume.lost:
        rows = Volume.objects.filter(pk=volume.pk)
        persistently(lambda: rows.update(stored=True, lost=False, node_id=node_id))


def refused(claim: Claim, error: host_errors.HostError) -> DomainError | None:
    """The error for a volume that the host refused; None if it refused something else."""
    volume = claim.volume
    match error:
        case host_errors.VolumeInUse():
            return Conflict(ENDING.format(name=volume.name), code=VOLUME)
        case host_errors.VolumeDamaged():
            return Conflict(DAMAGED.format(name=volume.name), code=error.code)
        case host_errors.VolumeMissing():
            if not installation.is_mismatched():
                persistently(lambda: Volume.objects.filter(pk=volume.pk).update(lost=True))
            return Conflict(LOST.format(name=volume.name), code="volume_lost")
    return None


def give_up(claim: Claim | None) -> None:
    """Its sandbox never was: a volume that was created for it goes too, if nobody else has it.

    In a transaction with the team's lock.
    """
    if claim is not None and claim.made:
        Volume.objects.filter(pk=claim.volume.pk, stored=False, sandboxes=None).delete()


# Every minute ------------------------------------------------------------------------------------


def expire_overdue() -> None:
    """Delete the volumes whose time is up, but for those that a sandbox has."""
    due = Volume.objects.filter(deleted_at=None, expires_at__lte=timezone.now())
    for volume in due.filter(~Exists(Sandbox.objects.live().filter(volume=OuterRef("pk")))):
        if expire(volume):
            release(volume.pk)


def expire(volume: Volume) -> bool:
    """Mark one as deleted, and tell webhooks; whether it still was to expire."""
    now = timezone.now()
    with held(volume.team):
        try:
            require_free(volume)
        except Conflict:
            return False
        rows = Volume.objects.filter(pk=volume.pk, deleted_at=None, expires_at__lte=now)
        if not rows.update(deleted_at=now):
            return False
        outbox.put(volume.team_id, EventType.VOLUME_EXPIRED, volume.pk, description(volume, now))
    return True


def description(volume: Volume, at: datetime) -> dict[str, object]:
    """What an event says of a volume."""
    return {
        "volume_id": volume.pk,
        "name": volume.name,
        "size_mb": volume.size_mb,
        "region": volume.region,
        "expires_at": timestamp(volume.expires_at),
        "deleted_at": timestamp(at),
    }


def reconcile() -> None:
    """Make the rows agree with the host's volumes. Raises the host's errors.

    Only for a host whose state belongs to this database. What no row names is kept, and reported:
    it may be all that is left of somebody's data.
    """
    # Read before the host is asked: it had them before the rows said so.
    expected = set(Volume.objects.filter(stored=True, deleted_at=None).values_list("pk", flat=True))
    present = {info.id: info for info in host().volumes()}
    rows = {volume.pk: volume for volume in Volume.objects.filter(pk__in=present)}
    for volume_id, info in present.items():
        volume = rows.get(volume_id)
        if volume is None:
            logger.error("volume %s is on the host but has no row; it is kept", volume_id)
        elif volume.deleted_at is not None:
            # The host was unreachable, or a sandbox was still ending, when somebody deleted it.
            release(volume_id)
        elif volume.used_bytes != info.used_bytes or not volume.stored or volume.lost:
            found = {"used_bytes": info.used_bytes, "stored": True, "lost": False}
            Volume.objects.filter(pk=volume_id).update(**found)
    Volume.objects.filter(pk__in=expected - present.keys()).update(lost=True)
