"""Moving processes between control groups without waiting for an RCU grace period.

By default the kernel keeps fork and exit as cheap as possible, and moving a process between groups
waits for a grace period: some ten milliseconds for each command of each sandbox.  The mount option
``favordynmods`` (Linux 6.0, "Mounting" in Documentation/admin-guide/cgroup-v2.rst) makes the move
immediate; the cost for a fork could not be measured.  It applies to all hierarchies of the machine
and lasts until it reboots.
"""

from __future__ import annotations

import logging
from pathlib import Path

from hostruntime.container.cgroups import cgroup_layout
from hostruntime.errors import HostFault
from hostruntime.host.run import run

OPTION = "favordynmods"
_SECONDS = 10
_log = logging.getLogger(__name__)


def favor_migrations() -> None:
    """Enable fast migrations; log if that is not possible."""
    where = cgroup_layout().unified
    if OPTION in mount_options(where):
        return
    try:
        # mount(8) keeps the existing options.
        run(["mount", "-o", f"remount,{OPTION}", str(where)], timeout=_SECONDS)
        _log.info("%s remounted with %s", where, OPTION)
    except HostFault as error:
        # A kernel before 6.0, or a machine where the mount cannot be changed: commands start later.
        _log.info("commands start some milliseconds later than they could: %s", error.detail)


def mount_options(where: Path, mountinfo: Path = Path("/proc/self/mountinfo")) -> frozenset[str]:
    """The superblock options of what is mounted at ``where`` (mountinfo in proc(5))."""
    for line in mountinfo.read_text(errors="replace").splitlines():
        mount, _, system = line.partition(" - ")
        if mount.split()[4] == str(where):
            return frozenset(system.split()[2].split(","))
    return frozenset()
