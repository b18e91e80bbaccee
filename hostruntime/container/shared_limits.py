"""Machine-wide kernel limits that sandboxes could exhaust: raised, or shared out.

Each limits something whose memory is charged to the container that uses it, so the container's
size limits it already; a low machine-wide limit would only let one container take what its
neighbours and the host need.  They are raised when the agent starts, never lowered, and last until
the machine reboots.  The limit of processes and threads cannot be raised (``threads-max``, an
eighth of the memory), so all containers of an instance share a part of it.
"""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hostruntime.container import delegation
from hostruntime.container.cgroups import CGROUPS, cgroup_layout
from hostruntime.container.config import MAX_TERMINALS
from hostruntime.host.ids import MAX_SLOTS
from hostruntime.host.paths import Instance
from hostruntime.network.firewall import CONNECTIONS_PER_SLOT

SYSCTLS = Path("/proc/sys")
# kernel.pty.reserve: the number that the kernel reserves for the host.
_RESERVED_TERMINALS = 1024
_NEIGHBOURS_PER_SLOT = 2
_log = logging.getLogger(__name__)

# By name below /proc/sys (Documentation/admin-guide/sysctl in the kernel's tree).
MINIMUMS: Mapping[str, int] = {
    # The maximum on 64 bits (PID_MAX_LIMIT), which systemd sets as well.
    "kernel/pid_max": 4_194_304,
    "kernel/pty/max": MAX_SLOTS * MAX_TERMINALS + _RESERVED_TERMINALS,
    # The kernel's maximum, which systemd sets as well.
    "fs/file-max": 2**63 - 1,
    # Kernel memory, 320 bytes each; every slot has its share.
    "net/netfilter/nf_conntrack_max": MAX_SLOTS * CONNECTIONS_PER_SLOT,
    # The lists that a full table is searched by, 8 bytes each: of four connections, not of sixteen
    # (Documentation/networking/nf_conntrack-sysctl.rst).
    "net/netfilter/nf_conntrack_buckets": MAX_SLOTS * CONNECTIONS_PER_SLOT // 4,
    # All network namespaces share one table of neighbours (arp(7)), in which each slot with a link
    # has an entry for either end: from the first number on, old ones are collected; beyond the
    # last, nobody gets a new one, and the host loses its own network.
    **{
        f"net/ipv4/neigh/default/gc_thresh{number}": MAX_SLOTS * _NEIGHBOURS_PER_SLOT * number
        for number in (1, 2, 3)
    },
}


# Socket memory of all network namespaces together, in pages: low, pressure and maximum (tcp(7)).  A
# large sandbox can reach the kernel's default, some 9 % of the memory; socket buffers are charged
# to the container in cgroup v2, but not in v1.
_SOCKET_MEMORY = ("net/ipv4/tcp_mem", "net/ipv4/udp_mem")


@dataclass(frozen=True)
class LowLimit:
    """A limit that is too low: its value, and what to set it to."""

    name: str
    value: str
    required: str

    @property
    def setting(self) -> str:
        """Its name in the format of sysctl(8)."""
        return self.name.replace("/", ".")

    @property
    def assignment(self) -> str:
        """The argument that makes sysctl(8) set it, quoted for a shell."""
        return shlex.quote(f"{self.setting}={self.required}")


def low_limits(sysctls: Path = SYSCTLS, cgroups: Path = CGROUPS) -> list[LowLimit]:
    """The limits that are too low, except those that this kernel does not have (yet)."""
    required = {name: str(number) for name, number in MINIMUMS.items()}
    if (cgroups / "cgroup.controllers").exists():
        required |= dict.fromkeys(_SOCKET_MEMORY, _socket_memory_pages())
    low = []
    for name, numbers in required.items():
        value = _numbers(sysctls / name)
        if value and value[-1] < int(numbers.split()[-1]):
            low.append(LowLimit(name, " ".join(map(str, value)), numbers))
    return low


def raise_limits(sysctls: Path = SYSCTLS, cgroups: Path = CGROUPS) -> None:
    """Raise low limits; log those that cannot be raised, with the command to do it."""
    for low in low_limits(sysctls, cgroups):
        try:
            (sysctls / low.name).write_text(f"{low.required}\n")
        except OSError as error:
            message = "%s stays %s (%s), so one sandbox can harm others; run sysctl -w %s"
            _log.warning(message, low.setting, low.value, error.strerror, low.assignment)
        else:
            _log.info("%s raised from %s to %s", low.setting, low.value, low.required)


def _socket_memory_pages() -> str:
    pages = os.sysconf("SC_PHYS_PAGES")
    return f"{pages // 2} {pages * 5 // 8} {pages * 3 // 4}"


def max_processes(sysctls: Path = SYSCTLS) -> int:
    """The maximum of processes and threads of all containers of an instance: three quarters."""
    limits = [_numbers(sysctls / f"kernel/{name}") for name in ("pid_max", "threads-max")]
    return min(number for numbers in limits for number in numbers) * 3 // 4


def limit_processes(instance: Instance) -> None:
    """Reserve a quarter of the possible processes for the host; idempotent.

    Raises HostError, OSError.
    """
    layout, maximum = cgroup_layout(), max_processes()
    group = layout.pids_group(instance.prefix)
    if layout.delegated:
        delegation.limit_tasks(instance, maximum)
        return
    if layout.kind == "v2":
        (layout.unified / "cgroup.subtree_control").write_text("+pids")
    group.mkdir(exist_ok=True)
    (group / "pids.max").write_text(f"{maximum}\n")


def _numbers(path: Path) -> list[int]:
    """The numbers in a sysctl's file; empty if it does not exist."""
    try:
        return [int(word) for word in path.read_text().split()]
    except (OSError, ValueError):
        return []
