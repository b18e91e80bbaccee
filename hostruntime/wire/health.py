"""The agent's health, and the egress proxy's decisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hostruntime.wire.message import Message


@dataclass(frozen=True)
class DiskStatus(Message):
    """The space on the disk of the state directory; sizes are null until it is first checked.

    ``level`` is well, low, critical or read_only. ``held`` is the number of containers that are
    frozen until there is space again; ``ballast`` tells whether the ballast file is allocated.
    """

    level: str = "well"
    size_bytes: int | None = None
    free_bytes: int | None = None
    reserve_bytes: int | None = None
    free_files: int | None = None
    reserve_files: int | None = None
    held: int = 0
    ballast: bool = False


@dataclass(frozen=True)
class CapacityStatus(Message):
    """What containers have been promised, and the most they may be; null from earlier agents.

    ``memory_mb`` and ``cpu`` are the sums of their limits, in MiB and processors;
    ``available_mb`` is the memory that is available now, and below ``min_available_mb`` nothing
    starts.
    """

    containers: int
    max_containers: int
    memory_mb: int
    max_memory_mb: int
    cpu: float
    max_cpu: float
    available_mb: int
    min_available_mb: int


@dataclass(frozen=True)
class Health(Message):
    """``GET /health``: ``cgroup`` is v1, hybrid or v2; ``proxy`` has ``healthy``, ``address``.

    ``notes`` are sentences on package managers whose registries sandboxes cannot reach, and on the
    disk if it is low on space or read-only.  ``room`` is the space on that disk, ``capacity`` what
    else there is for sandboxes.
    """

    version: str
    state_dir: str
    instance: int
    cgroup: str
    proxy: Mapping[str, Any] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()
    room: DiskStatus = field(default_factory=DiskStatus)
    capacity: CapacityStatus | None = None


@dataclass(frozen=True)
class DefaultDomains(Message):
    """``GET /egress/defaults``: the default allowlist of the restricted network."""

    domains: Sequence[str]


@dataclass(frozen=True)
class EgressHost(Message):
    """One container's requests to one host and port; ``reason`` and ``message`` are the latest.

    Has the number of ``allowed`` and ``refused`` requests, and the bytes of closed tunnels.
    """

    host: str
    port: int
    allowed: int
    refused: int
    reason: str
    message: str
    last_at: float
    sent_bytes: int
    received_bytes: int
    # The allowed requests that failed: no address, connection refused, timed out, no TLS.
    unreached: int = 0
    # Bypassing the proxy: a DNS query, which has no port (0), or a direct connection attempt.
    direct: bool = False


@dataclass(frozen=True)
class EgressHosts(Message):
    """``GET /egress/hosts``, refused ones first."""

    hosts: tuple[EgressHost, ...]


@dataclass(frozen=True)
class EgressDecision(Message):
    """One decision of the egress proxy, or on an attempt to bypass it (``direct``).

    ``verdict`` is allowed, refused, or unreached (allowed, but the host could not be reached).
    """

    at: float
    owner: str
    host: str
    port: int
    verdict: str
    reason: str
    address: str = ""
    method: str = ""
    message: str = ""
    direct: bool = False
