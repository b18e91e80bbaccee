"""What sandboxes use now, and used lately: a minute of samples each, in memory.

The samples are by-products of the readings that usage is summed from
(:mod:`hostruntime.sandbox.usage`), so they cost no reading of their own: an object per sandbox and
two seconds, the oldest of which are dropped. A restart of the agent begins them anew. What is kept
for longer, and on disk, is in :mod:`hostruntime.sandbox.history`.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from hostruntime.container.manager import ContainerManager
from hostruntime.network.traffic import sent_and_received
from hostruntime.sandbox.history import Gauges
from hostruntime.wire.sandboxes import MetricsSample

WINDOW_SECONDS = 60.0
# Too short an interval says little, and a longer one than this is no sample of a moment.
MIN_INTERVAL, MAX_INTERVAL = 0.5, 10.0
_SAMPLES = 31


@dataclass
class Windows:
    """The samples by sandbox id, oldest first."""

    _samples: dict[str, deque[MetricsSample]] = field(default_factory=dict)

    def add(
        self, sandbox_id: str, at: float, seconds: float, cpu_seconds: float, memory_bytes: int
    ) -> None:
        """Add what was used in the ``seconds`` before ``at``, in Unix seconds."""
        if MIN_INTERVAL <= seconds <= MAX_INTERVAL:
            window = self._samples.setdefault(sandbox_id, deque(maxlen=_SAMPLES))
            window.append(MetricsSample(at, max(cpu_seconds, 0.0) / seconds, memory_bytes))

    def of(self, sandbox_id: str) -> tuple[MetricsSample, ...]:
        """Those of one sandbox; none if it has just started, or has ended."""
        return tuple(self._samples.get(sandbox_id, ()))

    def forget(self, sandbox_id: str) -> None:
        """Drop those of a sandbox that has ended."""
        self._samples.pop(sandbox_id, None)


def read_gauges(containers: ContainerManager, sandbox_id: str) -> Gauges:
    """What no control group tells of a sandbox; in a few system calls, in a thread."""
    disk = traffic = None
    with contextlib.suppress(OSError):
        disk = containers.disk_used(sandbox_id)[0]
    slot = containers.pool.slot_of(sandbox_id)
    if slot is not None and (link := containers.pool.link(slot)) is not None:
        traffic = sent_and_received(link.host_end)
    return Gauges(disk, traffic)


def refresh_figures(containers: ContainerManager, cpu_us: Mapping[str, int]) -> None:
    """Refresh what containers are told of their use, given the CPU times of the sandboxes."""
    slots = {sandbox_id: containers.pool.slot_of(sandbox_id) for sandbox_id in cpu_us}
    known = {slot.index: cpu_us[each] for each, slot in slots.items() if slot is not None}
    containers.figures.refresh(known)
