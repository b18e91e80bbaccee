"""A deadline that a jump of the clock does not move: so many seconds of this boot.

The wall clock is set by people, by NTP and by the hypervisor, an hour either way. What is to end
*after so long* is kept by ``CLOCK_BOOTTIME`` (clock_gettime(2)), which only goes on, also while the
machine sleeps, and is the same for every process; it begins anew with each boot, so what is kept
on disk says of which.
"""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def elapsed() -> float:
    """Seconds since this machine was started, asleep or awake."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@cache
def this_boot() -> str:
    """What tells this boot from every other (random(4))."""
    return _BOOT_ID.read_text().strip()


def due(deadline: float | None) -> float | None:
    """When ``deadline``, in Unix seconds, is by :func:`elapsed`; None for no deadline."""
    return None if deadline is None else elapsed() + (deadline - time.time())


def deadline_of(moment: float | None) -> float | None:
    """When a moment of :func:`elapsed` is by the wall clock as it goes now, in Unix seconds."""
    return None if moment is None else time.time() + (moment - elapsed())
