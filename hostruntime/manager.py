"""Containers by owner: everything a sandbox and a build have in common.

A :class:`ContainerManager` puts the pieces together: a slot of the network, a mounted root, a
running LXC container.  Starting undoes whatever it did when a later piece fails; stopping is
idempotent and leaves only the container's ``directory``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hostruntime.exec import Frame
from hostruntime.limits import Limits
from hostruntime.network import Slot
from hostruntime.policy import Policy


@dataclass(frozen=True)
class ContainerSpec:
    """What to start: ``owner`` is unique on the host, ``directory`` gets the writable layer."""

    owner: str
    image_tree: Path
    policy: Policy
    limits: Limits
    directory: Path


@dataclass(frozen=True)
class Running:
    """A running container.  ``upper`` is the writable layer, its ids as inside (0 = root)."""

    owner: str
    name: str
    slot: Slot
    init_pid: int
    started_at: float
    boot_ms: float
    spec: ContainerSpec

    @property
    def upper(self) -> Path:
        """The overlay's upper directory (capture reads it once the container has stopped)."""
        return self.spec.directory / "rw" / "upper"


class ContainerManager:
    """Starts, runs commands in, and stops containers.  One per agent; asyncio, one event loop."""

    async def start(self, spec: ContainerSpec) -> Running:
        """Start a container; on any failure nothing is left.  Raises HostFull, HostFault."""
        raise NotImplementedError

    def exec(
        self,
        owner: str,
        argv: Sequence[str],
        *,
        cwd: str,
        env: Mapping[str, str],
        timeout: float | None,
        merge_output: bool = False,
    ) -> AsyncIterator[Frame]:
        """Run ``argv``; iterate its frames under ``contextlib.aclosing`` (closing kills the tree).

        ``timeout`` is in seconds.  ``merge_output`` gives both streams one pipe, so that their
        order is kept; all of it then arrives as stdout.  Raises ContainerGone, CwdNotFound.
        """
        raise NotImplementedError

    async def stop(self, owner: str) -> None:
        """Kill, unmount, give the slot back; idempotent; leaves ``directory``."""
        raise NotImplementedError

    async def kill_strays(self, owner: str) -> None:
        """Kill everything in the container but its init."""
        raise NotImplementedError

    def running(self) -> dict[str, Running]:
        """The running containers by owner."""
        raise NotImplementedError
