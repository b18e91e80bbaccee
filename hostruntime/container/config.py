"""The LXC configuration of a container: pure data on what it gets and what it does not.

Keys are those of lxc.container.conf(5).  The container runs in a user namespace with its own range
of host ids, so its root is an unprivileged user on the host.  Capabilities without a legitimate use
are dropped as well, to reduce the kernel's attack surface.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hostruntime.container.rootfs import DEVICES
from hostruntime.host.ids import HIGH_IDS, IDS_PER_SLOT

if TYPE_CHECKING:
    from hostruntime.container.cgroups import CgroupLayout
    from hostruntime.container.limits import Limits

INIT = "/.orkestr/init -P"
# Pseudo-terminals that a container may have open at the same time.
MAX_TERMINALS = 64
_SHM_MB = 64

# World-readable files that expose the machine or its other tenants (proc(5)).  Other sensitive
# files belong to the host's root, which has no id inside.
_MASKED_FILES = (
    *("interrupts", "kallsyms", "kcore", "key-users", "keys"),
    *("latency_stats", "sched_debug", "timer_list"),
    # Names and activity of every disk of the machine, including each tenant's.
    *("diskstats", "partitions"),
)
_MASKED_DIRECTORIES = (
    *("proc/acpi", "proc/asound", "proc/bus", "proc/fs", "proc/irq", "proc/scsi"),
    # Loop devices show their backing files, which reveals the host's paths and tenants.
    *("sys/devices/virtual/block", "sys/devices/virtual/powercap", "sys/firmware"),
    # Mounted file systems, and how much was written to each.
    *("sys/fs/ext4", "sys/fs/xfs", "sys/fs/btrfs"),
)
# Files of 4 KiB on average fill a tmpfs before its inodes run out.
_INODES_PER_MB = 256

# What apt, dpkg, pip, npm, su, sudo, chown and chroot need (capabilities(7)).  net_raw has no
# effect, as the container does not own its network namespace, but without it the kernel refuses to
# execute ping and mtr, whose files have it.
CAPABILITIES = (
    "chown",
    "dac_override",
    "fowner",
    "fsetid",
    "kill",
    "net_bind_service",
    "net_raw",
    "setfcap",
    "setgid",
    "setpcap",
    "setuid",
    "sys_chroot",
)


@dataclass(frozen=True)
class ContainerConfig:
    """The settings that differ between containers.

    ``netns`` None means no network at all; ``apparmor`` is the name of a loaded profile
    (:mod:`hostruntime.container.apparmor`), None if the kernel has no AppArmor.
    """

    name: str
    hostname: str
    root: Path
    id_base: int
    netns: Path | None
    limits: Limits
    seccomp: Path
    apparmor: str | None
    log: Path

    def items(self, layout: CgroupLayout) -> list[tuple[str, str]]:
        """The configuration, in order; keys may repeat."""
        return [
            ("lxc.rootfs.path", f"dir:{self.root}"),
            ("lxc.uts.name", self.hostname),
            ("lxc.init.cmd", INIT),
            ("lxc.log.file", str(self.log)),
            ("lxc.log.level", "ERROR"),
            ("lxc.tty.max", "0"),
            # A console would be served by LXC's monitor, outside the container's limits.
            ("lxc.console.path", "none"),
            # The machine has a limited number (kernel.pty.max), shared by everybody.
            ("lxc.pty.max", str(MAX_TERMINALS)),
            *self._confinement(),
            *self._mounts(),
            *self._network(),
            *layout.lxc_items(self.limits, self.name),
        ]

    def _confinement(self) -> list[tuple[str, str]]:
        inside, outside, count = HIGH_IDS
        items = [
            ("lxc.idmap", f"u 0 {self.id_base} {IDS_PER_SLOT}"),
            ("lxc.idmap", f"g 0 {self.id_base} {IDS_PER_SLOT}"),
            ("lxc.idmap", f"u {inside} {outside} {count}"),
            ("lxc.idmap", f"g {inside} {outside} {count}"),
            # It gets an existing one (user_namespace_items).
            ("lxc.namespace.keep", "user"),
            ("lxc.cap.keep", " ".join(CAPABILITIES)),
            ("lxc.seccomp.profile", str(self.seccomp)),
        ]
        if self.apparmor is not None:
            items.append(("lxc.apparmor.profile", self.apparmor))
        return items

    def _mounts(self) -> list[tuple[str, str]]:
        devices = str(self.devices)
        return [
            # /sys is already mounted: a container that shares a network namespace of the initial
            # user namespace may not mount sysfs itself (sysfs(5)).
            ("lxc.mount.auto", "proc:mixed"),
            ("lxc.mount.entry", _tmpfs("workspace", self.limits.workspace_size_mb)),
            ("lxc.mount.entry", _tmpfs("tmp", self.limits.tmp_size_mb)),
            ("lxc.mount.entry", _tmpfs("dev/shm", min(_SHM_MB, self.limits.memory_mb // 4))),
            # These take precedence over LXC's bind mounts of the host's devices.
            *(("lxc.mount.entry", _device(devices, name)) for name in DEVICES),
            *(("lxc.mount.entry", entry) for entry in _mask_entries(devices)),
        ]

    @property
    def devices(self) -> Path:
        """The container's own device nodes (:mod:`hostruntime.container.rootfs`)."""
        return self.root.parent / "dev"

    def _network(self) -> list[tuple[str, str]]:
        if self.netns is None:
            return [("lxc.net.0.type", "empty")]
        return [("lxc.namespace.share.net", str(self.netns))]


def user_namespace_items(descriptor: int) -> list[tuple[str, str]]:
    """The configuration that makes LXC use a user namespace that this process has open.

    LXC itself would create one as root, and the usage of all containers would be charged to root
    (``creator_uid`` of :func:`hostruntime.host.kernel.create_user_namespace`).  LXC joins shared
    namespaces by kind, a user namespace first, and after that it may no longer join one of the
    host's network namespaces.  So this one is passed under the name of the last kind: setns(2)
    determines the kind by the descriptor.
    """
    return [("lxc.namespace.share.time", f"/proc/{os.getpid()}/fd/{descriptor}")]


def _tmpfs(target: str, size_mb: int) -> str:
    inodes = size_mb * _INODES_PER_MB
    options = f"rw,nosuid,nodev,mode=1777,size={size_mb}m,nr_inodes={inodes},create=dir"
    return f"tmpfs {target} tmpfs {options} 0 0"


def _device(devices: str, name: str) -> str:
    return f"{devices}/{name} dev/{name} none bind,create=file 0 0"


def _mask_entries(devices: str) -> Iterator[str]:
    """Mounts that hide those of the masked paths that this kernel has now."""
    # As text: each of these is looked at for each container.
    for name in _MASKED_FILES:
        if os.path.exists(f"/proc/{name}"):  # noqa: PTH110
            yield f"{devices}/null proc/{name} none bind,ro 0 0"
    for path in _MASKED_DIRECTORIES:
        if os.path.isdir(f"/{path}"):  # noqa: PTH112
            # A container without a network has no /sys.
            optional = ",optional" if path.startswith("sys/") else ""
            options = f"ro,nosuid,nodev,noexec,mode=555,size=4k,nr_inodes=1{optional}"
            yield f"tmpfs {path} tmpfs {options} 0 0"
