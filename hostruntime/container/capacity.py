"""Admission: how many containers this machine takes, and how much of it they may be promised.

A container's limits are what it may use, not what it uses: an idle sandbox of 1 GiB takes some
3 MB and no processor.  So the sum of all limits may exceed the machine, by factors that are
settings:

- ``ORKESTR_MAX_SANDBOXES``: sandboxes and builds at once; by default one for every 16 MiB of
  memory, 64 to 2,000, as each takes some megabytes and a share of the kernel's tables even idle.
- ``ORKESTR_MEMORY_OVERCOMMIT``: by default 16.  A machine of 16 GiB then takes 256 sandboxes of
  1 GiB, each with at least 64 MiB of its own, which is what a shell or an interpreter with some
  libraries uses.
- ``ORKESTR_CPU_OVERCOMMIT``: by default 128.  The kernel shares processors out fairly, so that too
  many sandboxes at work are slow together and none fails; four cores take 512 sandboxes of one.

Whatever was promised, nothing starts while less than a sixteenth of the memory (256 MiB to 2 GiB)
is available: then the promises are being used, and the kernel would soon kill somebody.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hostruntime.container.limits import Limits
from hostruntime.errors import HostFull, InvalidRequest
from hostruntime.host.ids import MAX_SLOTS
from hostruntime.wire.health import CapacityStatus

MAX_SETTING = "ORKESTR_MAX_SANDBOXES"
MEMORY_SETTING = "ORKESTR_MEMORY_OVERCOMMIT"
CPU_SETTING = "ORKESTR_CPU_OVERCOMMIT"
_MIB = 1024 * 1024
_MEMORY_PER_CONTAINER = 16 * _MIB
# Some slots are being made ready, or destroyed, while others are in use.
_SPARE_SLOTS = 48
_MIN_CONTAINERS, MAX_CONTAINERS = 64, MAX_SLOTS - _SPARE_SLOTS
_MEMORY_OVERCOMMIT, _CPU_OVERCOMMIT = 16.0, 128.0
_AVAILABLE_SHARE, _MIN_AVAILABLE, _MAX_AVAILABLE = 16, 256 * _MIB, 2048 * _MIB
_MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class Room:
    """The most that all containers together may be promised; see the module's settings."""

    containers: int
    memory_mb: int
    cpu: float
    min_available_mb: int

    @classmethod
    def of_machine(cls, environment: Mapping[str, str] = os.environ) -> Room:
        """This machine's.  Raises InvalidRequest for a setting that is no number of its range."""
        total = memory_bytes("MemTotal")
        default = min(max(total // _MEMORY_PER_CONTAINER, _MIN_CONTAINERS), MAX_CONTAINERS)
        containers = _number(environment, MAX_SETTING, default, 1, MAX_CONTAINERS)
        memory = _number(environment, MEMORY_SETTING, _MEMORY_OVERCOMMIT, 0.1, 10_000)
        cpu = _number(environment, CPU_SETTING, _CPU_OVERCOMMIT, 0.1, 10_000)
        return cls(
            containers=int(containers),
            memory_mb=int(total * memory) // _MIB,
            cpu=(os.cpu_count() or 1) * cpu,
            min_available_mb=min(max(total // _AVAILABLE_SHARE, _MIN_AVAILABLE), _MAX_AVAILABLE)
            // _MIB,
        )


@dataclass
class Capacity:
    """What has been promised to whom.  For use on one event loop, so that none is promised twice.

    ``available`` returns the memory in bytes that a program could still get.
    """

    room: Room = field(default_factory=Room.of_machine)
    available: Callable[[], int] = field(default=lambda: memory_bytes("MemAvailable"))
    _promised: dict[str, Limits] = field(default_factory=dict)
    # Of all of them, and in millionths, so that what is added and taken away again leaves nothing.
    _memory_mb: int = 0
    _cpu_millionths: int = 0

    def reserve(self, owner: str, limits: Limits) -> None:
        """Promise an owner these limits, until :meth:`release`; idempotent.

        Raises HostFull, with what is used up and the setting that says how much there is.
        """
        if owner in self._promised:
            return
        if problem := self._problem(limits):
            raise HostFull(f"{problem} Try again when a sandbox or a build has ended.")
        self.adopt(owner, limits)

    def adopt(self, owner: str, limits: Limits) -> None:
        """Count what runs already, even beyond what the settings now allow."""
        self.release(owner)
        self._promised[owner] = limits
        self._count(limits, 1)

    def release(self, owner: str) -> None:
        """End a promise; idempotent."""
        limits = self._promised.pop(owner, None)
        if limits is not None:
            self._count(limits, -1)

    def _count(self, limits: Limits, times: int) -> None:
        self._memory_mb += times * limits.memory_mb
        self._cpu_millionths += times * round(limits.cpu * 1e6)

    def status(self) -> CapacityStatus:
        """For the agent's health response."""
        return CapacityStatus(
            containers=len(self._promised),
            max_containers=self.room.containers,
            memory_mb=self._memory_mb,
            max_memory_mb=self.room.memory_mb,
            cpu=round(self._cpu, 3),
            max_cpu=round(self.room.cpu, 3),
            available_mb=self.available() // _MIB,
            min_available_mb=self.room.min_available_mb,
        )

    @property
    def _cpu(self) -> float:
        return self._cpu_millionths / 1e6

    def _problem(self, limits: Limits) -> str:
        """What prevents one more container; empty if nothing does."""
        room, memory_mb, cpu = self.room, self._memory_mb, self._cpu
        if len(self._promised) >= room.containers:
            return f"All {room.containers} sandboxes and builds of this host run ({MAX_SETTING})."
        if memory_mb + limits.memory_mb > room.memory_mb:
            return (
                f"Sandboxes and builds may use {memory_mb} MiB of memory, and {limits.memory_mb} "
                f"more would exceed {room.memory_mb} ({MEMORY_SETTING})."
            )
        # A setting such as 0.3 times 3 processors has last digits of its own.
        if cpu + limits.cpu > room.cpu + 1e-6:
            return (
                f"Sandboxes and builds may use {cpu:g} processors, and {limits.cpu:g} more would "
                f"exceed {room.cpu:g} ({CPU_SETTING})."
            )
        if (available_mb := self.available() // _MIB) < room.min_available_mb:
            return (
                f"Only {available_mb} MiB of this host's memory are available, and "
                f"{room.min_available_mb} are kept for what runs already."
            )
        return ""


def memory_bytes(name: str, meminfo: Path = _MEMINFO) -> int:
    """An amount from /proc/meminfo (proc_meminfo(5)) in bytes; 0 if the kernel does not say."""
    _, _, rest = f"\n{meminfo.read_text()}".partition(f"\n{name}:")
    return int(rest.split(maxsplit=1)[0]) * 1024 if rest else 0


def _number(
    environment: Mapping[str, str], name: str, default: float, least: float, most: float
) -> float:
    text = environment.get(name, "").strip()
    if not text:
        return default
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not least <= number <= most:
        raise InvalidRequest(f"{name} is {text!r}; it takes a number from {least:g} to {most:g}.")
    return number
