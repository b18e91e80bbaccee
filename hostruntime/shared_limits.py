"""Limits of the whole machine that sandboxes could use up: raised, and how much of it they get.

Each of :data:`RAISED` is a ceiling of the kernel's on something whose memory it takes from the
container that uses it, so that its size bounds it; the ceiling would only let one container take
what its neighbours and the host need.  They are raised when the agent starts, never lowered, and
stay so until the machine boots anew.  Processes and threads have a ceiling that cannot be raised
(``threads-max``, an eighth of the memory), so all containers of an instance share a part of it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hostruntime import delegation
from hostruntime.firewall import CONNECTIONS_PER_SLOT
from hostruntime.limits import cgroup_layout
from hostruntime.lxc_config import TERMINALS
from hostruntime.paths import MAX_SLOTS, Instance

SYSCTLS = Path("/proc/sys")
# kernel.pty.reserve: what the kernel keeps of them for the host.
_HOSTS_TERMINALS = 1024
_log = logging.getLogger(__name__)

# By their names below /proc/sys (Documentation/admin-guide/sysctl in the kernel's tree).
RAISED: Mapping[str, int] = {
    # The most there can be on 64 bits (PID_MAX_LIMIT), and what systemd sets.
    "kernel/pid_max": 4_194_304,
    "kernel/pty/max": MAX_SLOTS * TERMINALS + _HOSTS_TERMINALS,
    # The most the kernel takes, and what systemd sets.
    "fs/file-max": 2**63 - 1,
    # Memory of the kernel's own, 320 bytes each; every slot has its part of it.
    "net/netfilter/nf_conntrack_max": MAX_SLOTS * CONNECTIONS_PER_SLOT,
}


@dataclass(frozen=True)
class Low:
    """A limit that is lower than it should be."""

    name: str
    value: int
    wanted: int

    @property
    def setting(self) -> str:
        """Its name as sysctl(8) has it."""
        return self.name.replace("/", ".")


def low_limits(sysctls: Path = SYSCTLS) -> list[Low]:
    """Those of :data:`RAISED` that are lower; one that this kernel does not have (yet) is not."""
    found = []
    for name, wanted in RAISED.items():
        value = _number(sysctls / name)
        if value is not None and value < wanted:
            found.append(Low(name, value, wanted))
    return found


def raise_limits(sysctls: Path = SYSCTLS) -> None:
    """Raise what is low; what cannot be raised is logged with the command that would."""
    for low in low_limits(sysctls):
        try:
            (sysctls / low.name).write_text(f"{low.wanted}\n")
        except OSError as error:
            words = "%s stays %d (%s), by which one sandbox can harm others; sysctl -w %s=%d"
            _log.warning(words, low.setting, low.value, error.strerror, low.setting, low.wanted)
        else:
            _log.info("%s was %d and is %d now", low.setting, low.value, low.wanted)


def most_processes(sysctls: Path = SYSCTLS) -> int:
    """How many processes and threads all containers of an instance may have: three quarters."""
    limits = (_number(sysctls / f"kernel/{name}") for name in ("pid_max", "threads-max"))
    return min(number for number in limits if number is not None) * 3 // 4


def limit_processes(instance: Instance) -> None:
    """Leave the host a quarter of the processes that there may be; idempotent.

    Raises HostError, OSError.
    """
    layout, most = cgroup_layout(), most_processes()
    group = layout.processes_group(instance.prefix)
    if layout.delegated:
        delegation.limit_tasks(instance, most)
        return
    if layout.kind == "v2":
        (layout.unified / "cgroup.subtree_control").write_text("+pids")
    group.mkdir(exist_ok=True)
    (group / "pids.max").write_text(f"{most}\n")


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
