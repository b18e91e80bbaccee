"""How the agent is, and what the egress proxy let through and refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hostruntime.wire.message import Message


@dataclass(frozen=True)
class DiskRoom(Message):
    """The room on the disk of the state directory; sizes are null until it is first checked.

    ``level`` is well, low, critical or read_only. ``held`` containers are frozen until there is
    room again, and ``ballast`` tells whether the file is there that can be deleted to get some.
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
class Health(Message):
    """``GET /health``: ``cgroup`` is v1, hybrid or v2; ``proxy`` says ``healthy``, ``address``.

    ``notes`` are sentences on package managers whose registries sandboxes will not reach, and on
    the disk when it is short of room or read-only.
    """

    version: str
    state_dir: str
    instance: int
    cgroup: str
    proxy: Mapping[str, Any] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()
    room: DiskRoom = field(default_factory=DiskRoom)


@dataclass(frozen=True)
class DefaultDomains(Message):
    """``GET /egress/defaults``: the default allowlist of the restricted network."""

    domains: Sequence[str]


@dataclass(frozen=True)
class EgressHost(Message):
    """What one container did with one host and port; ``reason`` and ``message`` are the latest.

    How often it was ``allowed`` and ``refused``, and the bytes of tunnels that have ended.
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
    # Of what was allowed that which came to nothing: no address, refused, timed out, no TLS.
    unreached: int = 0
    # Asked for past the proxy: by DNS, which names no port (0), or an address that was tried.
    direct: bool = False


@dataclass(frozen=True)
class EgressHosts(Message):
    """``GET /egress/hosts``, refused ones first."""

    hosts: tuple[EgressHost, ...]


@dataclass(frozen=True)
class EgressDecision(Message):
    """One answer of the egress proxy, or to what was asked past it (``direct``).

    ``verdict`` is allowed, refused, or unreached: allowed, and then not to be reached.
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
