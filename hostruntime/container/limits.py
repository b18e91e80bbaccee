"""What a container may use of the machine."""

from __future__ import annotations

from dataclasses import dataclass, fields

from hostruntime.wire.resources import Resources


@dataclass(frozen=True, kw_only=True)
class Limits(Resources):
    """A container's requested share of the machine, and the limits derived from it.

    Swap is never added to the memory.  ``pids`` counts processes and threads.  ``workspace_mb`` and
    ``tmp_mb`` limit the two tmpfs, whose content also counts as memory; the disk limits everything
    else that is written, and thereby the number of files, one for every 16 KiB of it.  None derives
    each from the memory.
    """

    pids: int = 1024
    workspace_mb: int | None = None
    tmp_mb: int | None = None

    @classmethod
    def of(cls, resources: Resources) -> Limits:
        """The limits of a sandbox or a build."""
        return cls(**{item.name: getattr(resources, item.name) for item in fields(Resources)})

    @property
    def disk_size_mb(self) -> int:
        """The size of the writable layer; by default ten times the memory, 4 to 20 GiB."""
        return self.disk_mb or min(max(self.memory_mb * 10, 4096), 20_480)

    @property
    def workspace_size_mb(self) -> int:
        """The size of ``/workspace``; by default three quarters of the memory."""
        return self.workspace_mb or self.memory_mb * 3 // 4

    @property
    def tmp_size_mb(self) -> int:
        """The size of ``/tmp``; by default half of the memory."""
        return self.tmp_mb or self.memory_mb // 2
