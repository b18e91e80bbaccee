"""Sandboxes: what is asked of them, how they are, their snapshots, and what they have used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date

from hostruntime.wire.message import Message
from hostruntime.wire.resources import Resources


@dataclass(frozen=True)
class CreateSandbox(Resources):
    """``POST /sandboxes``: start one from an ``image``, or a ``snapshot``, whose disk it gets.

    ``network`` is off, restricted or open.  It ends at ``deadline``, or never.
    """

    id: str
    image: str = ""
    snapshot: str | None = None
    network: str = "off"
    allow_domains: Sequence[str] | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    deadline: float | None = None


@dataclass(frozen=True)
class SetDeadline(Message):
    """``PATCH /sandboxes/{id}``, and ``POST`` to its ``pause`` and ``resume``."""

    deadline: float | None


@dataclass(frozen=True)
class SandboxInfo(Message):
    """A sandbox; ``state`` is running or gone.

    ``reason`` of a gone one: ``expired`` (its deadline passed), ``exited`` (its init ended, for
    example because memory ran out), ``out_of_disk`` (the machine's disk was running out, and this
    took more than others) or ``host_lost`` (the machine or the container went away).  A running one
    may be ``paused``, or ``held`` (it stands still until the machine's disk has room again).
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
    """Sandboxes as they are after they changed, up to number ``seq`` of the agent's ``run``.

    Without ``whole`` there may be others: compare all that there are.
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
    """A snapshot of a sandbox over ``image``; ``frozen_ms`` is how long that stood still for it."""

    id: str
    sandbox: str
    image: str
    disk_mb: int
    size_bytes: int
    created_at: float
    frozen_ms: float = 0.0


@dataclass(frozen=True)
class Snapshots(Message):
    """``GET /snapshots``, the oldest first."""

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
    """The same of one ``day``, in UTC."""

    day: date


@dataclass(frozen=True)
class UsageInfo(Message):
    """What a sandbox has used since it started: sums that only grow, ``ended`` ones not any more.

    ``days`` (UTC, ascending) hold the last ones, ``before`` what was used earlier.
    """

    id: str
    ended: bool
    before: ResourceUsage
    days: tuple[DailyUsage, ...]

    @property
    def total(self) -> ResourceUsage:
        """All of it."""
        return sum(self.days, self.before)


@dataclass(frozen=True)
class Usage(Message):
    """``GET /usage``."""

    sandboxes: tuple[UsageInfo, ...]


@dataclass(frozen=True)
class CollectedUsage(Message):
    """``POST /usage/collected``: the host may forget what these used, as far as they have ended."""

    ids: Sequence[str]
