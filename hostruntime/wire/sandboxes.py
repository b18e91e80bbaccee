"""Sandboxes: requests, their state, their snapshots and their usage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date

from hostruntime.wire.message import Message
from hostruntime.wire.resources import Resources


@dataclass(frozen=True)
class CreateSandbox(Resources):
    """``POST /sandboxes``: start one from an ``image``, or from a ``snapshot`` with its disk.

    ``network`` is off, restricted or open.  It ends at ``deadline``; None is never.  With
    ``pause_seconds`` it is paused then, if it is running, and ends so much later.
    """

    id: str
    image: str = ""
    snapshot: str | None = None
    network: str = "off"
    allow_domains: Sequence[str] | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    deadline: float | None = None
    pause_seconds: float | None = None


@dataclass(frozen=True)
class SetDeadline(Message):
    """``PATCH /sandboxes/{id}``, and ``POST`` to its ``pause`` and ``resume``."""

    deadline: float | None


@dataclass(frozen=True)
class SandboxInfo(Message):
    """A sandbox; ``state`` is running or gone.

    ``reason`` of a gone one: ``expired`` (its deadline passed), ``exited`` (its init exited, for
    example for lack of memory), ``out_of_disk`` (the machine's disk was running out, and this one
    used more than others) or ``host_lost`` (the machine rebooted or the container vanished).  A
    running one may be ``paused``, or ``held`` (frozen until the machine's disk has space again).
    """

    id: str
    image: str
    state: str
    started_at: float
    boot_ms: float
    deadline: float | None
    network: str = "off"
    reason: str | None = None
    ended_at: float | None = None
    paused: bool = False
    held: bool = False


@dataclass(frozen=True)
class Sandboxes(Message):
    """``GET /sandboxes``."""

    sandboxes: tuple[SandboxInfo, ...]


@dataclass(frozen=True)
class ChangesInfo(Message):
    """The current state of changed sandboxes, up to number ``seq`` of the agent's ``run``.

    Unless ``whole``, changes may be missing: compare all sandboxes.
    """

    run: str
    seq: int
    whole: bool
    sandboxes: tuple[SandboxInfo, ...] = ()


# Snapshots -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CreateSnapshot(Message):
    """``POST /sandboxes/{id}/snapshots``."""

    id: str


@dataclass(frozen=True)
class SnapshotInfo(Message):
    """A snapshot of a sandbox over ``image``; ``frozen_ms`` is how long it was frozen for it."""

    id: str
    sandbox: str
    image: str
    disk_mb: int
    size_bytes: int
    created_at: float
    frozen_ms: float = 0.0


@dataclass(frozen=True)
class Snapshots(Message):
    """``GET /snapshots``, oldest first."""

    snapshots: tuple[SnapshotInfo, ...]


# Usage -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ResourceUsage(Message):
    """CPU-seconds, and gigabyte-seconds of memory (1 GB = 10⁹ bytes)."""

    cpu_seconds: float = 0.0
    gb_seconds: float = 0.0

    def __add__(self, other: ResourceUsage) -> ResourceUsage:
        return ResourceUsage(
            self.cpu_seconds + other.cpu_seconds, self.gb_seconds + other.gb_seconds
        )


@dataclass(frozen=True, kw_only=True)
class DailyUsage(ResourceUsage):
    """The usage of one ``day``, in UTC."""

    day: date


@dataclass(frozen=True)
class UsageInfo(Message):
    """A sandbox's usage since it started: sums that only grow, and are final once ``ended``.

    ``days`` (UTC, ascending) has the most recent ones, ``before`` the sum of earlier ones.
    """

    id: str
    ended: bool
    before: ResourceUsage
    days: tuple[DailyUsage, ...]

    @property
    def total(self) -> ResourceUsage:
        """The total usage."""
        return sum(self.days, self.before)


@dataclass(frozen=True)
class DeletedSandbox(Message):
    """``DELETE /sandboxes/{id}``: its usage, if the host has any that is not collected yet."""

    usage: UsageInfo | None = None


@dataclass(frozen=True)
class Usage(Message):
    """``GET /usage``."""

    sandboxes: tuple[UsageInfo, ...]


@dataclass(frozen=True)
class MetricsSample(Message):
    """What a sandbox used in the two seconds or so before ``at`` (Unix time): CPUs, and bytes.

    The bytes are all that the kernel charges to it, with its page cache.
    """

    at: float
    cpu_cores: float
    memory_bytes: int


@dataclass(frozen=True)
class SandboxMetrics(Message):
    """``GET /sandboxes/{id}/metrics``: what it uses now, its latest samples, and its total.

    ``memory_bytes`` is now, without what the kernel would drop first (the inactive page cache).
    """

    id: str
    memory_bytes: int | None
    total: ResourceUsage
    samples: tuple[MetricsSample, ...] = ()


@dataclass(frozen=True)
class CollectedUsage(Message):
    """``POST /usage/collected``: the host may delete the usage of those that have ended."""

    ids: Sequence[str]
