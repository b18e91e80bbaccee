"""The LXC configuration of a container: pure, a table of what it gets and what it does not.

Keys are those of lxc.container.conf(5).  The container runs in a user namespace with a host id
range of its own, so its root is nobody on the host.  Privilege it could never use for good is
dropped as well, to keep the kernel's rarely tested corners out of reach.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hostruntime.container.cgroups import CgroupLayout, Limits
from hostruntime.container.rootfs import DEVICES
from hostruntime.host.paths import HIGH_IDS, IDS_PER_SLOT

INIT = "/.orkestr/init -P"
# Pseudo-terminals that a container may have at once.
TERMINALS = 64
_SHM_MB = 64

# What tells of the machine or of its other tenants, to anybody who may read it (proc(5)).  The
# rest that is delicate belongs to the host's root, who is nobody inside.
_MASKED_FILES = (
    *("interrupts", "kallsyms", "kcore", "key-users", "keys"),
    *("latency_stats", "sched_debug", "timer_list"),
    # What every disk of the machine is and does, each tenant's among them.
    *("diskstats", "partitions"),
)
_MASKED_DIRECTORIES = (
    *("proc/acpi", "proc/asound", "proc/bus", "proc/fs", "proc/irq", "proc/scsi"),
    # Loop devices say which file they are made of, which names the host's paths and its tenants.
    *("sys/devices/virtual/block", "sys/devices/virtual/powercap", "sys/firmware"),
    # What is mounted on each, and how much was written to it since.
    *("sys/fs/ext4", "sys/fs/xfs", "sys/fs/btrfs"),
)
# Files of 4 KiB on average fill a tmpfs before its inodes run out.
_INODES_PER_MB = 256

# What apt, dpkg, pip, npm, su, sudo, chown and chroot need (capabilities(7)).  net_raw does
# nothing, as the network namespace is not the container's, but without it the kernel refuses to
# execute ping and mtr, whose files carry it.
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
    """What differs from one container to the next.

    ``netns`` None means no network at all; ``apparmor`` is the name of a profile that is loaded
    (:mod:`hostruntime.container.apparmor`), None where the kernel has no AppArmor.
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
            # The other end of a console would be LXC's monitor, outside the container's limits.
            ("lxc.console.path", "none"),
            # There are only so many on the machine (kernel.pty.max), for everybody.
            ("lxc.pty.max", str(TERMINALS)),
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
            # It gets one that is made already (user_namespace_items).
            ("lxc.namespace.keep", "user"),
            ("lxc.cap.keep", " ".join(CAPABILITIES)),
            ("lxc.seccomp.profile", str(self.seccomp)),
        ]
        if self.apparmor is not None:
            items.append(("lxc.apparmor.profile", self.apparmor))
        return items

    def _mounts(self) -> list[tuple[str, str]]:
        return [
            # /sys is there already: a container that shares a network namespace of the initial
            # user namespace may not mount sysfs itself (sysfs(5)).
            ("lxc.mount.auto", "proc:mixed"),
            ("lxc.mount.entry", _tmpfs("workspace", self.limits.workspace_size_mb)),
            ("lxc.mount.entry", _tmpfs("tmp", self.limits.tmp_size_mb)),
            ("lxc.mount.entry", _tmpfs("dev/shm", min(_SHM_MB, self.limits.memory_mb // 4))),
            # In place before LXC would bind the host's.
            *(("lxc.mount.entry", _device(self.devices, name)) for name in DEVICES),
            *(("lxc.mount.entry", entry) for entry in _masks(Path("/"), self.devices)),
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
    """What has LXC start the container in a user namespace that this process has open.

    LXC itself makes one as root, to whose account then goes what every container holds (`maker` of
    :func:`hostruntime.host.kernel.user_namespace`).  What is shared it joins by kind, a user
    namespace first, and after that it may not join a network namespace of the host's any more.  So
    this one is handed over under the name of the last kind: setns(2) goes by what a descriptor is.
    """
    return [("lxc.namespace.share.time", f"/proc/{os.getpid()}/fd/{descriptor}")]


def _tmpfs(target: str, size_mb: int) -> str:
    inodes = size_mb * _INODES_PER_MB
    options = f"rw,nosuid,nodev,mode=1777,size={size_mb}m,nr_inodes={inodes},create=dir"
    return f"tmpfs {target} tmpfs {options} 0 0"


def _device(devices: Path, name: str) -> str:
    return f"{devices / name} dev/{name} none bind,create=file 0 0"


def _masks(host: Path, devices: Path) -> Iterator[str]:
    """Mounts that hide those of the masked paths that this kernel has."""
    for name in _MASKED_FILES:
        if (host / "proc" / name).exists():
            yield f"{devices / 'null'} proc/{name} none bind,ro 0 0"
    for path in _MASKED_DIRECTORIES:
        if (host / path).is_dir():
            # A container without a network of its own has no /sys.
            optional = ",optional" if path.startswith("sys/") else ""
            options = f"ro,nosuid,nodev,noexec,mode=555,size=4k,nr_inodes=1{optional}"
            yield f"tmpfs {path} tmpfs {options} 0 0"
