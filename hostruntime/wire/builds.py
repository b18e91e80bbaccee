"""Builds of templates: requests, their state and their events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field, model_serializer, model_validator

from hostruntime.wire.message import Message
from hostruntime.wire.resources import CpuCount, MemoryMb, Resources

MAX_STEPS = 100
_ENVELOPE = ("seq", "at", "kind")


@dataclass(frozen=True)
class Cache(Message):
    """The ``scope`` (a plain name) in which a build stores layers, and may reuse them.

    ``reuse``: identical steps of earlier builds of the scope are not run again.
    """

    scope: str
    reuse: bool = False


@dataclass(frozen=True)
class StartBuild(Resources):
    """``POST /builds``: build an image that will have the build's id.

    ``network`` is restricted or open.  ``env`` is stored in the image.  Without a ``cache`` no
    layers are stored or reused.
    """

    id: str
    base_image: str
    recipe: Annotated[Sequence[str], Field(min_length=1, max_length=MAX_STEPS)]
    network: str
    allow_domains: Sequence[str] | None = None
    cpu: CpuCount = field(default=2.0, kw_only=True)
    memory_mb: MemoryMb = field(default=4096, kw_only=True)
    step_timeout_seconds: Annotated[float, Field(gt=0)] = 600.0
    build_timeout_seconds: Annotated[float, Field(gt=0)] = 1800.0
    cache: Cache | None = None
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BuildInfo(Message):
    """The state of a build; ``state`` is running, published, failed or cancelled.

    ``error`` has ``code``, ``message`` and perhaps ``step`` and ``refused``.
    """

    id: str
    state: str
    last_seq: int = 0
    error: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class BuildEvent(Message):
    """One event of a build; ``data`` has the fields that belong to its ``kind``.

    ========== =================================================================================
    boot       ``boot_ms`` (the container alone), ``duration_ms`` (the whole phase)
    step_*     ``step`` (from 1); ``started``: ``total``, ``command``; ``silent``: ``seconds``
    …cached    instead of started and finished, for a reused step: ``total``, ``command``,
               ``build`` (that ran it) and ``saved_at`` (when, Unix seconds)
    output     ``step``, ``text`` (at most 64 KiB)
    …finished  ``exit_code``, ``signal``, ``duration_ms``, ``output_bytes``, ``elided_bytes``;
               ``added_bytes``, ``added_files``: its change of the disk, possibly negative
    progress   ``phase`` (capture, scrub, contents or publish), ``files`` and ``bytes`` processed
               so far; every second of a phase that takes longer
    scrub      ``removed_bytes``, ``duration_ms``, ``removed``: [{``what``, ``bytes``, ``files``}]
    capture    ``size_bytes``, ``file_count``, ``shared_bytes``, ``duration_ms``
    contents   ``digest``, ``packages``: {dpkg, pip, npm: [[name, version]]}, ``truncated``,
               ``duration_ms``
    published  ``image``, the sizes as in capture, ``total_ms``, ``publish_ms``
    failed     ``code``, ``message``, perhaps ``step`` and ``refused`` (hosts)
    ========== =================================================================================

    On the wire and in the build's log, all fields are in one flat object.
    """

    seq: int
    at: float
    kind: str
    data: dict[str, Any]

    @model_validator(mode="before")
    @classmethod
    def _nest_data(cls, flat: Any) -> Any:
        if not isinstance(flat, dict):
            return flat
        envelope = {name: flat[name] for name in _ENVELOPE if name in flat}
        return {**envelope, "data": {name: flat[name] for name in flat if name not in envelope}}

    @model_serializer
    def _flatten(self) -> dict[str, Any]:
        return {"seq": self.seq, "at": self.at, "kind": self.kind, **self.data}
