"""What to build, and what a build needs from its host: data shared by all phases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from hostruntime.build.layers import LayerStore
from hostruntime.build.report import RefusedHost, UnreachedNotice
from hostruntime.container.limits import Limits
from hostruntime.container.manager import ContainerManager
from hostruntime.image.store import ImageStore
from hostruntime.network.egress import EgressProxy
from hostruntime.network.policy import Policy
from hostruntime.wire.builds import Cache


class Emit(Protocol):
    """A callback for events: kind and fields, as in :mod:`hostruntime.wire.builds`."""

    def __call__(self, kind: str, /, **fields: Any) -> None:
        """Record one event."""


@dataclass(frozen=True)
class Host:
    """What an assembly needs from the host.

    ``runtime_tree`` takes a policy and an image's tree. ``refusals`` takes an owner and a Unix
    time and returns the hosts the network policy has refused it since; it reads files, so call it
    in a thread.
    """

    store: ImageStore
    containers: ContainerManager
    runtime_tree: Callable[[Policy, Path], Path]
    refusals: Callable[[str, float], list[RefusedHost]]
    layers: LayerStore
    # Like ``refusals``, for allowed hosts that could not be reached.
    unreached: Callable[[str, float], list[UnreachedNotice]] = lambda _owner, _since: []


@dataclass(frozen=True)
class Plan:
    """What to build. Timeouts are in seconds; ``directory`` is the container's.

    ``provide`` is called with the writable layer's directory before the container starts, in a
    thread, to add files. Without a ``cache`` no layers are saved. ``env`` is baked into the image
    (:mod:`hostruntime.image.environment`). ``details`` and ``definition`` go into the manifest.
    """

    image_id: str
    kind: Literal["base", "template"]
    base: str
    recipe: tuple[str, ...]
    policy: Policy
    limits: Limits
    step_timeout: float
    build_timeout: float
    directory: Path
    provide: Callable[[Path], None] | None = None
    cache: Cache | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    definition: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


def refused_hosts(proxy: EgressProxy, owner: str, since: float) -> list[RefusedHost]:
    """Return the hosts an owner's container was refused since a Unix time, without duplicates."""
    refused = (d for d in proxy.decisions(owner, since) if d.verdict == "refused")
    return list(dict.fromkeys(RefusedHost(d.host, d.port, d.reason, d.direct) for d in refused))


def unreached_hosts(proxy: EgressProxy, owner: str, since: float) -> list[UnreachedNotice]:
    """Return why an owner's container could not reach allowed hosts since a Unix time."""
    found = (d for d in proxy.decisions(owner, since) if d.verdict == "unreached")
    return list(dict.fromkeys(UnreachedNotice(d.message, d.direct) for d in found))
