"""Limits of the whole machine that sandboxes could use up: raised, and how much of it they get.

Each is a ceiling of the kernel's on something whose memory it takes from the container that uses
it, so that its size bounds it; the ceiling would only let one container take what its neighbours
and the host need.  They are raised when the agent starts, never lowered, and stay so until the
machine boots anew.  Processes and threads have a ceiling that cannot be raised
(``threads-max``, an eighth of the memory), so all containers of an instance share a part of it.
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
from hostruntime.container.config import TERMINALS
from hostruntime.host.paths import MAX_SLOTS, Instance
from hostruntime.network.firewall import CONNECTIONS_PER_SLOT

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


# What sockets of all network namespaces hold together, in pages: when pressure begins, is high, and
# nothing more is given (tcp(7)).  A large sandbox can reach the kernel's default, some 9 % of the
# memory; what is in a container's sockets is its memory in cgroup v2, but not in v1.
_IN_SOCKETS = ("net/ipv4/tcp_mem", "net/ipv4/udp_mem")


@dataclass(frozen=True)
class Low:
    """A limit that is lower than it should be: what it is, and what to set it to."""

    name: str
    value: str
    wanted: str

    @property
    def setting(self) -> str:
        """Its name as sysctl(8) has it."""
        return self.name.replace("/", ".")

    @property
    def assignment(self) -> str:
        """The word that has sysctl(8) set it, quoted for a shell."""
        return shlex.quote(f"{self.setting}={self.wanted}")


def low_limits(sysctls: Path = SYSCTLS, cgroups: Path = CGROUPS) -> list[Low]:
    """The limits that are too low; one that this kernel does not have (yet) is not."""
    wanted = {name: str(number) for name, number in RAISED.items()}
    if (cgroups / "cgroup.controllers").exists():
        wanted |= dict.fromkeys(_IN_SOCKETS, _most_in_sockets())
    found = []
    for name, numbers in wanted.items():
        value = _numbers(sysctls / name)
        if value and value[-1] < int(numbers.split()[-1]):
            found.append(Low(name, " ".join(map(str, value)), numbers))
    return found


def raise_limits(sysctls: Path = SYSCTLS, cgroups: Path = CGROUPS) -> None:
    """Raise what is low; what cannot be raised is logged with the command that would."""
    for low in low_limits(sysctls, cgroups):
        try:
            (sysctls / low.name).write_text(f"{low.wanted}\n")
        except OSError as error:
            words = "%s stays %s (%s), by which one sandbox can harm others; sysctl -w %s"
            _log.warning(words, low.setting, low.value, error.strerror, low.assignment)
        else:
            _log.info("%s was %s and is %s now", low.setting, low.value, low.wanted)


def _most_in_sockets() -> str:
    pages = os.sysconf("SC_PHYS_PAGES")
    return f"{pages // 2} {pages * 5 // 8} {pages * 3 // 4}"


def most_processes(sysctls: Path = SYSCTLS) -> int:
    """How many processes and threads all containers of an instance may have: three quarters."""
    limits = [_numbers(sysctls / f"kernel/{name}") for name in ("pid_max", "threads-max")]
    return min(number for numbers in limits for number in numbers) * 3 // 4


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


def _numbers(path: Path) -> list[int]:
    """What a sysctl's file holds; nothing without it."""
    try:
        return [int(word) for word in path.read_text().split()]
    except (OSError, ValueError):
        return []
