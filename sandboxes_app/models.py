"""A Sandbox and its events, Volumes and Snapshots. Rows stay after the end, as the history."""

from __future__ import annotations

from datetime import timedelta
from typing import ClassVar

from django.db import models
from django.utils import timezone

from orkestr_console.accounts.models import Team, User
from orkestr_console.core.ids import new_id


class SandboxStatus(models.TextChoices):
    """The status of a sandbox, as in the wire contract."""

    STARTING = "starting", "Starting"
    RUNNING = "running", "Running"
    PAUSING = "pausing", "Pausing"
    PAUSED = "paused", "Paused"
    RESUMING = "resuming", "Resuming"
    TERMINATED = "terminated", "Terminated"
    FAILED = "failed", "Failed"

    @property
    def tone(self) -> str:
        """The badge's colour: ``busy``, ``good``, ``quiet`` or ``bad``."""
        return {
            "running": "good",
            "paused": "quiet",
            "terminated": "quiet",
            "failed": "bad",
        }.get(self.value, "busy")

    @property
    def is_terminal(self) -> bool:
        """Whether it is final."""
        return self in {SandboxStatus.TERMINATED, SandboxStatus.FAILED}


# On the way to another state: driven there by a process, which may have been killed.
TRANSITIONAL = (SandboxStatus.STARTING, SandboxStatus.PAUSING, SandboxStatus.RESUMING)
LIVE = (
    SandboxStatus.STARTING,
    SandboxStatus.RUNNING,
    SandboxStatus.PAUSING,
    SandboxStatus.PAUSED,
    SandboxStatus.RESUMING,
)


# Those that use a slot for paused sandboxes.
PAUSED_STATUSES = (SandboxStatus.PAUSING, SandboxStatus.PAUSED)
# How long a sandbox may be paused before it ends.
MAX_PAUSE = timedelta(days=7)


class SandboxQuerySet(models.QuerySet["Sandbox"]):
    """Sandboxes, filtered."""

    def for_team(self, team: Team) -> SandboxQuerySet:
        """One team's sandboxes: the only entry point for callers."""
        return self.filter(team=team)

    def running(self) -> SandboxQuerySet:
        """Sandboxes that can be used now."""
        return self.filter(status=SandboxStatus.RUNNING)

    def live(self) -> SandboxQuerySet:
        """Sandboxes that have not ended: they count against the plan."""
        return self.filter(status__in=LIVE)


class VolumeQuerySet(models.QuerySet["Volume"]):
    """Volumes, filtered."""

    def for_team(self, team: Team) -> VolumeQuerySet:
        """One team's volumes, without deleted ones: they count against the plan."""
        return self.filter(team=team, deleted_at=None)

    def with_holders(self) -> VolumeQuerySet:
        """The same, each with its :attr:`Volume.holder`."""
        holders = Sandbox.objects.live().filter(volume=models.OuterRef("pk"))
        return self.annotate(held_by=models.Subquery(holders.values("pk")[:1]))


def new_volume_id() -> str:
    """A new volume id. A function, so that migrations can refer to it."""
    return new_id("vol")


class Volume(models.Model):
    """Storage that outlives sandboxes, mounted at /persist in one at a time.

    The host creates it with its first sandbox: it is ``stored`` from then on, and never created
    again. The row of a deleted one stays, for the host to delete what it may still have.
    """

    id = models.CharField(max_length=40, primary_key=True, default=new_volume_id, editable=False)
    team = models.ForeignKey(Team, on_delete=models.CASCADE, related_name="volumes")
    created_by = models.ForeignKey(
        User, on_delete=models.SET_NULL, null=True, blank=True, related_name="volumes"
    )
    name = models.CharField(max_length=63)
    size_mb = models.PositiveIntegerField()
    region = models.CharField(max_length=32)
    node_id = models.CharField(max_length=100, blank=True, default="")
    stored = models.BooleanField(default=False)
    # The host had it, and has it no more.
    lost = models.BooleanField(default=False)
    # What it takes on the host's disk, by the last look.
    used_bytes = models.BigIntegerField(default=0)
    # At most one of them is set, and then the deadline that it makes of the time of creation.
    max_lifetime_days = models.PositiveIntegerField(null=True, blank=True)
    max_lifetime_hours = models.PositiveIntegerField(null=True, blank=True)
    expires_at = models.DateTimeField(null=True, blank=True)
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    deleted_at = models.DateTimeField(null=True, blank=True)

    objects = VolumeQuerySet.as_manager()

    class Meta:
        indexes: ClassVar[list[models.Index]] = [
            models.Index(fields=["team", "-created_at", "-id"]),
        ]
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(
                fields=["team", "name"],
                condition=models.Q(deleted_at=None),
                name="volume_name_unique_in_team",
            ),
        ]

    def __str__(self) -> str:
        return self.id

    @property
    def holder(self) -> str | None:
        """The live sandbox that has it, if it comes from :meth:`VolumeQuerySet.with_holders`."""
        found: str | None = getattr(self, "held_by", None)
        return found

    @property
    def status(self) -> str:
        """What it is good for now, of :meth:`VolumeQuerySet.with_holders`."""
        if self.lost:
            return "lost"
        return "available" if self.holder is None else "attached"

    @property
    def used_mb(self) -> int:
        """The megabytes that it takes on the host's disk, of those of ``size_mb``."""
        return -(-self.used_bytes // (1024 * 1024))


def new_sandbox_id() -> str:
    """A new sandbox id. A function, so that migrations can refer to it."""
    return new_id("sbx")


class Sandbox(models.Model):
    """A container in use. ``template`` keeps the requested name or id, even if that is deleted."""

    id = models.CharField(max_length=40, primary_key=True, default=new_sandbox_id, editable=False)
    team = models.ForeignKey(Team, on_delete=models.CASCADE, related_name="sandboxes")
    created_by = models.ForeignKey(
        User, on_delete=models.SET_NULL, null=True, blank=True, related_name="sandboxes"
    )
    template = models.CharField(max_length=64)
    template_name = models.CharField(max_length=100)
    image_id = models.CharField(max_length=64)
    network = models.CharField(max_length=16)
    allow_domains = models.JSONField(null=True, blank=True)
    size = models.CharField(max_length=16)
    cpu = models.FloatField()
    memory_mb = models.PositiveIntegerField()
    status = models.CharField(
        max_length=16, choices=SandboxStatus.choices, default=SandboxStatus.STARTING
    )
    env = models.JSONField(default=dict)
    metadata = models.JSONField(default=dict)
    timeout_seconds = models.PositiveIntegerField()
    on_timeout = models.CharField(max_length=8, default="kill")
    auto_resume = models.BooleanField(default=False)
    preview_auth = models.BooleanField(default=False)
    region = models.CharField(max_length=32)
    node_id = models.CharField(max_length=100)
    # What it has at /persist; its name stays when the volume is gone.
    volume = models.ForeignKey(
        Volume,
        on_delete=models.SET_NULL,
        null=True,
        blank=True,
        related_name="sandboxes",
        db_index=False,
    )
    volume_name = models.CharField(max_length=63, blank=True, default="")
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    # Who starts, pauses or resumes it now, or releases its container when it has ended
    # (orkestr_console.queue.driving).
    driver = models.CharField(max_length=40, blank=True, default="")
    started_at = models.DateTimeField(null=True, blank=True)
    expires_at = models.DateTimeField()
    ended_at = models.DateTimeField(null=True, blank=True)
    error_message = models.TextField(blank=True, default="")
    boot_ms = models.FloatField(null=True, blank=True)
    # What it has used, by the last reading of the host's counters.
    cpu_seconds = models.FloatField(default=0)
    gb_seconds = models.FloatField(default=0)

    objects = SandboxQuerySet.as_manager()

    class Meta:
        indexes: ClassVar[list[models.Index]] = [
            models.Index(fields=["team", "-created_at", "-id"]),
            models.Index(
                fields=["expires_at"],
                name="sandbox_live",
                condition=models.Q(
                    status__in=["starting", "running", "pausing", "paused", "resuming"]
                ),
            ),
            models.Index(fields=["driver"], name="sandbox_driven", condition=~models.Q(driver="")),
            models.Index(
                fields=["volume"],
                name="sandbox_with_volume",
                condition=models.Q(volume__isnull=False),
            ),
        ]
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.CheckConstraint(
                condition=models.Q(status__in=SandboxStatus.values), name="sandbox_status_known"
            ),
            models.UniqueConstraint(
                fields=["volume"],
                condition=models.Q(
                    status__in=["starting", "running", "pausing", "paused", "resuming"],
                    volume__isnull=False,
                ),
                name="one_live_sandbox_of_a_volume",
            ),
        ]

    def __str__(self) -> str:
        return self.id

    @property
    def state(self) -> SandboxStatus:
        """The status as the enumeration, with its tone."""
        return SandboxStatus(self.status)

    @property
    def searched(self) -> str:
        """The text that the filter above the list matches, in lower case."""
        metadata = [f"{key}={value}" for key, value in self.metadata.items()]
        return " ".join([self.template_name, self.id, self.status, *metadata]).lower()

    @property
    def is_running(self) -> bool:
        """Whether commands can be run in it."""
        return self.status == SandboxStatus.RUNNING

    @property
    def pauses_on_timeout(self) -> bool:
        """Whether it is paused when it expires, instead of ended."""
        return self.on_timeout == "pause"

    @property
    def is_paused(self) -> bool:
        """Whether it is paused until somebody resumes it."""
        return self.status == SandboxStatus.PAUSED


class SandboxEvent(models.Model):
    """One change of a sandbox, stored in the transaction that made it."""

    sandbox = models.ForeignKey(Sandbox, on_delete=models.CASCADE, related_name="events")
    kind = models.CharField(max_length=32)
    from_status = models.CharField(max_length=16, blank=True, default="")
    to_status = models.CharField(max_length=16)
    at = models.DateTimeField(default=timezone.now, editable=False)
    data = models.JSONField(default=dict)

    class Meta:
        ordering: ClassVar[list[str]] = ["id"]

    def __str__(self) -> str:
        return f"{self.sandbox_id} {self.kind}"


class SnapshotStatus(models.TextChoices):
    """The status of a snapshot, as in the wire contract."""

    CAPTURING = "capturing", "Capturing"
    READY = "ready", "Ready"
    FAILED = "failed", "Failed"

    @property
    def tone(self) -> str:
        """The badge's colour: ``busy``, ``good`` or ``bad``."""
        return {"ready": "good", "failed": "bad"}.get(self.value, "busy")


class SnapshotQuerySet(models.QuerySet["Snapshot"]):
    """Snapshots, filtered."""

    def for_team(self, team: Team) -> SnapshotQuerySet:
        """One team's snapshots, without deleted ones."""
        return self.filter(team=team, deleted_at=None)

    def stored(self) -> SnapshotQuerySet:
        """Snapshots that have files on the host, or soon will: they count against the plan."""
        statuses = (SnapshotStatus.CAPTURING, SnapshotStatus.READY)
        return self.filter(status__in=statuses, deleted_at=None)


def new_snapshot_id() -> str:
    """A new snapshot id. A function, so that migrations can refer to it."""
    return new_id("snap")


class Snapshot(models.Model):
    """The files of a sandbox at one instant, to start others from; no memory, no processes.

    It outlives its sandbox and its template: what it needs of them is copied. The row of a deleted
    one stays, so that deleting it again is not an error.
    """

    id = models.CharField(max_length=40, primary_key=True, default=new_snapshot_id, editable=False)
    team = models.ForeignKey(Team, on_delete=models.CASCADE, related_name="snapshots")
    created_by = models.ForeignKey(
        User, on_delete=models.SET_NULL, null=True, blank=True, related_name="snapshots"
    )
    name = models.CharField(max_length=100, blank=True, default="")
    status = models.CharField(
        max_length=16, choices=SnapshotStatus.choices, default=SnapshotStatus.CAPTURING
    )
    template = models.CharField(max_length=64)
    template_name = models.CharField(max_length=100)
    image_id = models.CharField(max_length=64)
    size = models.CharField(max_length=16)
    cpu = models.FloatField()
    memory_mb = models.PositiveIntegerField()
    network = models.CharField(max_length=16)
    allow_domains = models.JSONField(null=True, blank=True)
    source_sandbox_id = models.CharField(max_length=40)
    size_mb = models.PositiveIntegerField(null=True, blank=True)
    region = models.CharField(max_length=32)
    node_id = models.CharField(max_length=100)
    error_message = models.TextField(blank=True, default="")
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    # Who captures it (orkestr_console.queue.driving).
    driver = models.CharField(max_length=40, blank=True, default="")
    ready_at = models.DateTimeField(null=True, blank=True)
    deleted_at = models.DateTimeField(null=True, blank=True)

    objects = SnapshotQuerySet.as_manager()

    class Meta:
        indexes: ClassVar[list[models.Index]] = [
            models.Index(fields=["team", "-created_at", "-id"]),
            models.Index(
                fields=["driver"],
                name="snapshot_capturing",
                condition=models.Q(status="capturing"),
            ),
        ]
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.CheckConstraint(
                condition=models.Q(status__in=SnapshotStatus.values), name="snapshot_status_known"
            ),
        ]

    def __str__(self) -> str:
        return self.id

    @property
    def title(self) -> str:
        """Its name; without one, that of what its sandbox was started from."""
        return self.name or self.template_name

    @property
    def state(self) -> SnapshotStatus:
        """The status as the enumeration, with its tone."""
        return SnapshotStatus(self.status)

    @property
    def is_capturing(self) -> bool:
        """Whether it is still being taken."""
        return self.status == SnapshotStatus.CAPTURING

    @property
    def is_ready(self) -> bool:
        """Whether sandboxes can be started from it."""
        return self.status == SnapshotStatus.READY


class UsedUpload(models.Model):
    """A signed address of an upload that has been used, by its nonce, until it expires."""

    id = models.CharField(max_length=32, primary_key=True, editable=False)
    expires_at = models.DateTimeField(db_index=True)

    def __str__(self) -> str:
        return self.id
