"""What a container may use, and the cgroups that enforce it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """A container's share of the machine.

    ``cpu`` is in CPUs (1.5 = one and a half), ``memory_mb`` in MiB (swap is never added to it),
    ``pids`` counts processes and threads.  ``workspace_mb`` and ``tmp_mb`` bound the two tmpfs,
    whose content also counts as memory; None derives them from ``memory_mb``.
    """

    cpu: float = 1.0
    memory_mb: int = 1024
    pids: int = 1024
    workspace_mb: int | None = None
    tmp_mb: int | None = None
