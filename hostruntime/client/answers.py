"""What the host agent answers, as types: shared by the agent's tests and every client.

All times named ``…_at``, ``deadline`` are Unix seconds (float), durations ``…_ms`` milliseconds,
sizes bytes.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import date
from typing import Any, Literal, Self


@dataclass(frozen=True)
class Answer:
    """Base of the answers that are plain JSON objects; unknown fields are ignored."""

    @classmethod
    def from_wire(cls, payload: Mapping[str, Any]) -> Self:
        """Build from the JSON object; a missing field takes its default, else raises TypeError."""
        known = {item.name for item in fields(cls)}
        return cls(**{key: value for key, value in payload.items() if key in known})


@dataclass(frozen=True)
class Health(Answer):
    """``GET /health``: ``cgroup`` is v1, hybrid or v2; ``proxy`` says ``healthy``, ``address``.

    ``notes`` are sentences on package managers whose registries sandboxes will not reach, and on
    the disk when it is short of room or read-only.  ``room`` has its ``level`` (well, low, critical
    or read_only), ``free_bytes`` and ``free_files``, what is reserved of each, how many containers
    are ``held`` for it, and whether there is ``ballast``.
    """

    version: str
    state_dir: str
    instance: int
    cgroup: str
    proxy: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    room: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BaseInfo(Answer):
    """A built-in base image; ``state`` is ready, missing, building or failed."""

    name: str
    title: str
    description: str
    state: str
    size_bytes: int | None = None
    digest: str | None = None


@dataclass(frozen=True)
class ImageInfo(Answer):
    """An image of the store; ``kind`` is base or template."""

    id: str
    kind: str
    base: str | None = None
    created_at: float = 0.0
    size_bytes: int = 0
    file_count: int = 0
    shared_bytes: int = 0
    digest: str | None = None


@dataclass(frozen=True)
class ImageUsage(Answer):
    """What an image takes now; ``users`` counts the sandboxes and builds that run on it.

    ``shared_bytes`` are hard-linked to other images too; ``reclaimable_bytes`` is the rest, which
    comes back once the image is deleted and its last user has gone.
    """

    size_bytes: int
    shared_bytes: int
    reclaimable_bytes: int
    users: int


@dataclass(frozen=True)
class BuildInfo(Answer):
    """A build; ``state`` is running, published, failed or cancelled."""

    id: str
    state: str
    last_seq: int = 0
    error: dict[str, Any] | None = None


@dataclass(frozen=True)
class BuildEvent:
    """One event of a build; ``data`` has the fields that belong to its ``kind``.

    ========== =================================================================================
    boot       ``boot_ms`` (the container alone), ``duration_ms`` (the whole phase)
    step_*     ``step`` (from 1); ``started``: ``total``, ``command``; ``silent``: ``seconds``
    …cached    instead of started and finished, of a step that is reused: ``total``, ``command``,
               ``build`` (that ran it) and ``saved_at`` (when it had, Unix seconds)
    output     ``step``, ``text`` (at most 64 KiB)
    …finished  ``exit_code``, ``signal``, ``duration_ms``, ``output_bytes``, ``elided_bytes``;
               ``added_bytes``, ``added_files``: what it added to the disk, perhaps negative
    progress   ``phase`` (capture, scrub, contents or publish), ``files`` and ``bytes`` that it has
               dealt with; every second of a phase that takes longer
    scrub      ``removed_bytes``, ``duration_ms``, ``removed``: [{``what``, ``bytes``, ``files``}]
    capture    ``size_bytes``, ``file_count``, ``shared_bytes``, ``duration_ms``
    contents   ``digest``, ``packages``: {dpkg, pip, npm: [[name, version]]}, ``truncated``,
               ``duration_ms``
    published  ``image``, the sizes as in capture, ``total_ms``, ``publish_ms``
    failed     ``code``, ``message``, perhaps ``step`` and ``refused`` (hosts)
    ========== =================================================================================
    """

    seq: int
    at: float
    kind: str
    data: dict[str, Any]

    @classmethod
    def from_wire(cls, payload: Mapping[str, Any]) -> BuildEvent:
        """Build from one NDJSON object."""
        data = {k: v for k, v in payload.items() if k not in ("seq", "at", "kind")}
        return cls(int(payload["seq"]), float(payload["at"]), str(payload["kind"]), data)


@dataclass(frozen=True)
class Progress:
    """One line of a base being built; the last one is ``done`` (with the image)."""

    kind: Literal["progress", "done"]
    message: str
    image: dict[str, Any] | None = None


@dataclass(frozen=True)
class SandboxInfo(Answer):
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
class ChangesInfo:
    """Sandboxes as they are after they changed, up to number ``seq`` of the agent's ``run``.

    Without ``whole`` there may be others: compare all that there are.
    """

    run: str
    seq: int
    whole: bool
    sandboxes: tuple[SandboxInfo, ...] = ()

    @classmethod
    def from_wire(cls, payload: Mapping[str, Any]) -> ChangesInfo:
        """Build from the JSON object."""
        found = tuple(SandboxInfo.from_wire(item) for item in payload["sandboxes"])
        return cls(str(payload["run"]), int(payload["seq"]), bool(payload["whole"]), found)


@dataclass(frozen=True)
class SnapshotInfo(Answer):
    """A snapshot of a sandbox over ``image``; ``frozen_ms`` is how long that stood still for it."""

    id: str
    sandbox: str
    image: str
    disk_mb: int
    size_bytes: int
    created_at: float
    frozen_ms: float = 0.0


@dataclass(frozen=True)
class Used:
    """CPU-seconds, and gigabyte-seconds of memory (1 GB = 10⁹ bytes)."""

    cpu_seconds: float = 0.0
    gb_seconds: float = 0.0

    def __add__(self, other: Used) -> Used:
        return Used(self.cpu_seconds + other.cpu_seconds, self.gb_seconds + other.gb_seconds)


@dataclass(frozen=True)
class UsageInfo:
    """What a sandbox has used since it started: sums that only grow, ``ended`` ones not any more.

    ``days`` (UTC, ascending) hold the last ones, ``before`` what was used earlier.
    """

    id: str
    ended: bool
    before: Used
    days: tuple[tuple[date, Used], ...]

    @property
    def total(self) -> Used:
        """All of it."""
        return sum((used for _, used in self.days), self.before)

    @classmethod
    def from_wire(cls, payload: Mapping[str, Any]) -> UsageInfo:
        """Build from the JSON object."""
        days = tuple(
            (date.fromisoformat(item["day"]), Used(item["cpu_seconds"], item["gb_seconds"]))
            for item in payload["days"]
        )
        return cls(str(payload["id"]), bool(payload["ended"]), Used(**payload["before"]), days)


@dataclass(frozen=True)
class ExecResult:
    """A command that ended; ``code`` is 128 + n when signal n killed it.

    ``truncated`` says that output beyond the cap was read and dropped (the command was not
    disturbed); ``out_of_memory`` that the kernel killed something in the container meanwhile.
    """

    code: int
    signal: int | None
    stdout: bytes
    stderr: bytes
    duration_ms: int
    out_of_memory: bool = False
    truncated: bool = False
    pid: int | None = None


@dataclass(frozen=True)
class ExecFrame:
    """One frame of a streamed exec, as in the contract.

    ``kind`` started: ``pid``; chunk: ``stream`` and ``data``; exited: ``code``, ``signal``,
    ``duration_ms``, ``out_of_memory``, ``truncated``; error: ``error_code``, ``message``,
    ``duration_ms`` and perhaps ``signal``.
    """

    kind: Literal["started", "chunk", "exited", "error"]
    pid: int | None = None
    stream: str | None = None
    data: bytes = b""
    code: int | None = None
    signal: int | None = None
    duration_ms: int | None = None
    out_of_memory: bool = False
    truncated: bool = False
    error_code: str | None = None
    message: str | None = None

    @classmethod
    def from_wire(cls, payload: Mapping[str, Any]) -> ExecFrame:
        """Build from one NDJSON object (``data`` is base64 there; an error's code is ``code``)."""
        values = dict(payload)
        if values.get("kind") == "error":
            values["error_code"] = values.pop("code", None)
        values["data"] = base64.b64decode(values.get("data") or "")
        known = {item.name for item in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})


@dataclass(frozen=True)
class DirectoryEntry(Answer):
    """One name in a directory; ``mode`` holds the permission bits, ``modified_at`` Unix seconds."""

    name: str
    is_dir: bool
    size: int
    mode: int
    modified_at: float


@dataclass(frozen=True)
class FileStat(Answer):
    """What is at a path; everything but ``path`` and ``exists`` is meaningless when it is not."""

    path: str
    exists: bool
    is_dir: bool = False
    size: int = 0
    mode: int = 0
    modified_at: float = 0.0


@dataclass(frozen=True)
class FileContent:
    """A file that was read whole."""

    stat: FileStat
    content: bytes


@dataclass(frozen=True)
class StandingInfo(Answer):
    """Which installation the host's state is of; ``mismatch`` is why nothing is reconciled."""

    id: str = ""
    epoch: int = 0
    mismatch: str = ""
    since: float | None = None


@dataclass(frozen=True)
class Reconciliation(Answer):
    """The ids of what a pass set aside, and of what waits for the next one or an operator."""

    set_aside: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class HeldInfo(Answer):
    """Something in quarantine; ``reason`` is unknown or damaged, ``detail`` says why in words."""

    key: str
    kind: str
    name: str
    reason: str
    detail: str
    at: float
    size_bytes: int | None = None


@dataclass(frozen=True)
class DirectoryListing:
    """A directory that was read, sorted by name."""

    stat: FileStat
    entries: tuple[DirectoryEntry, ...]


@dataclass(frozen=True)
class EgressHost(Answer):
    """What one container did with one host: how often, and bytes of tunnels that have ended."""

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
class EgressDecision(Answer):
    """One answer of the egress proxy, or to what was asked past it (``direct``).

    ``verdict`` is allowed, refused or unreached.
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
