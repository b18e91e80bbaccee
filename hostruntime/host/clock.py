"""Deadlines that a jump of the wall clock does not move: seconds since this boot.

People, NTP and the hypervisor set the wall clock, an hour either way. A deadline *after some time*
is kept by ``CLOCK_BOOTTIME`` (clock_gettime(2)), which only moves forward, also while the machine
sleeps, and is the same for every process. It restarts with each boot, so a record on disk names
the boot it belongs to.
"""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def elapsed() -> float:
    """Seconds since this machine booted, including time asleep."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@cache
def boot_id() -> str:
    """The kernel's unique ID of this boot (random(4))."""
    return _BOOT_ID.read_text().strip()


def to_boottime(deadline: float | None) -> float | None:
    """Convert ``deadline`` from Unix seconds to the scale of :func:`elapsed`; None stays None."""
    return None if deadline is None else elapsed() + (deadline - time.time())


def to_wall_clock(boot_seconds: float | None) -> float | None:
    """Convert a time of :func:`elapsed` to Unix seconds, by the wall clock as it is now."""
    return None if boot_seconds is None else time.time() + (boot_seconds - elapsed())
