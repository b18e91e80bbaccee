"""A container's share of the machine, the same for sandboxes and builds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from hostruntime.wire.message import Message

_MAX_MB = 1024 * 1024
CpuCount = Annotated[float, Field(ge=0.1, le=256)]
MemoryMb = Annotated[int, Field(ge=32, le=_MAX_MB)]
DiskMb = Annotated[int, Field(ge=16, le=_MAX_MB)]


@dataclass(frozen=True, kw_only=True)
class Resources(Message):
    """The requested resources and their limits.

    ``cpu`` is in CPUs (1.5 = one and a half).  Without ``disk_mb`` the disk is ten times the
    memory, 4 to 20 GiB.
    """

    cpu: CpuCount
    memory_mb: MemoryMb
    disk_mb: DiskMb | None = None
