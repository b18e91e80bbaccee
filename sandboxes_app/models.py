"""A Sandbox and what happened to it. Rows stay after the end: they are the history."""

from __future__ import annotations

from typing import ClassVar

from django.db import models
from django.utils import timezone

from orkestr_console.accounts.models import Team, User
from orkestr_console.core.ids import new_id


class SandboxStatus(models.TextChoices):
    """Where a sandbox is, in the words of the wire contract."""

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
        """Whether it never changes again."""
        return self in {SandboxStatus.TERMINATED, SandboxStatus.FAILED}


# On the way to another state: somebody drives it there, or was killed.
TRANSITIONAL = (SandboxStatus.STARTING, SandboxStatus.PAUSING, SandboxStatus.RESUMING)
LIVE = (
    SandboxStatus.STARTING,
    SandboxStatus.RUNNING,
    SandboxStatus.PAUSING,
    SandboxStatus.PAUSED,
    SandboxStatus.RESUMING,
)


class SandboxQuerySet(models.QuerySet["Sandbox"]):
    """Sandboxes, filtered."""

    def for_team(self, team: Team) -> SandboxQuerySet:
        """Those of one team: the only way in for a caller."""
        return self.filter(team=team)

    def running(self) -> SandboxQuerySet:
        """Those that can be used now."""
        return self.filter(status=SandboxStatus.RUNNING)

    def live(self) -> SandboxQuerySet:
        """Those that have not ended: they count against the plan."""
        return self.filter(status__in=LIVE)


def new_sandbox_id() -> str:
    """A fresh sandbox id, as a migration can name it."""
    return new_id("sbx")


class Sandbox(models.Model):
    """A container somebody uses. ``template`` keeps what was asked for, even once deleted."""

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
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    # Who starts, pauses or resumes it now, or frees its container when it has ended
    # (orkestr_console.queue.driving).
    driver = models.CharField(max_length=40, blank=True, default="")
    started_at = models.DateTimeField(null=True, blank=True)
    expires_at = models.DateTimeField()
    ended_at = models.DateTimeField(null=True, blank=True)
    error_message = models.TextField(blank=True, default="")
    boot_ms = models.FloatField(null=True, blank=True)
    # What it has used, as the host's counters last said.
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
        ]
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.CheckConstraint(
                condition=models.Q(status__in=SandboxStatus.values), name="sandbox_status_known"
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
        """What the box above the list finds it by, in lower case."""
        metadata = [f"{key}={value}" for key, value in self.metadata.items()]
        return " ".join([self.template_name, self.id, self.status, *metadata]).lower()

    @property
    def is_running(self) -> bool:
        """Whether commands can be run in it."""
        return self.status == SandboxStatus.RUNNING

    @property
    def is_paused(self) -> bool:
        """Whether it stands still until somebody resumes it."""
        return self.status == SandboxStatus.PAUSED


class SandboxEvent(models.Model):
    """One thing that happened to a sandbox: written in the transaction that changed it."""

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
    """Where a snapshot is, in the words of the wire contract."""

    CAPTURING = "capturing", "Capturing"
    READY = "ready", "Ready"
    FAILED = "failed", "Failed"


class SnapshotQuerySet(models.QuerySet["Snapshot"]):
    """Snapshots, filtered."""

    def for_team(self, team: Team) -> SnapshotQuerySet:
        """Those of one team, deleted ones left out."""
        return self.filter(team=team, deleted_at=None)

    def stored(self) -> SnapshotQuerySet:
        """Those that have, or are about to have, files on the host: they count."""
        kept = (SnapshotStatus.CAPTURING, SnapshotStatus.READY)
        return self.filter(status__in=kept, deleted_at=None)


def new_snapshot_id() -> str:
    """A fresh snapshot id, as a migration can name it."""
    return new_id("snap")


class Snapshot(models.Model):
    """The files of a sandbox as they were, to start others from; no memory, no processes.

    It outlives its sandbox and its template: what it needs of them is copied. A deleted one stays
    as a row, so that deleting it again is known to be no mistake.
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
    # Who takes it (orkestr_console.queue.driving).
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
