"""What an instance keeps outside its state directory, because a reboot erases it.

Network namespaces and their assignments do not survive a reboot, and neither does `/run`::

    /run/orkestr/                  root:root 0711
      instances/                   root:root 0700, which state directory has which number (paths.py)
      <instance>/                  root:root 0711
        roots/<container name>/    the container's root:… 0700, in 0711 (rootfs.py)
        lxc/                       0711, LXC's lxcpath; empty
        netns/<slot name>          a network namespace, bind-mounted (namespaces(7))
        sysfs/<slot name>/         the sysfs of that namespace
        disks/<owner>/             a container's writable layer, mounted
        volumes/<volume id>/       a volume that a sandbox has, mounted
        figures/<slot index>/      what a container is told of its size, on a ramfs
        slots/<index>.json         which owner has the slot
        seccomp-<digest>           the profile that LXC confines a container's init with
        egress/                    root:proxy 0750, what the egress proxy may read
          helper.pyz, errors/      the proxy's helper and its refusal pages
          defaults.json            the default allowlist
          entries/<address>.json   who has a restricted address, and what it may reach
          decisions/<owner>.ndjson proxy:proxy, requests and decisions
          direct/<owner>.ndjson    root:root, attempts to bypass the proxy

The directory of an instance is mounted onto itself, privately: what is mounted in it then shows in
no other mount namespace of the machine (systemd makes one for many a service,
mount_namespaces(7)), and whoever starts with a copy of it all detaches it by a single call.

Unless stated otherwise, everything is owned by root and closed to everybody else: containers' files
have the ids they have inside, so files of root's in there would otherwise be open to every user of
this machine.  Three directories can be traversed, but not listed: LXC (5.0.2 and 6.0) enters a
container's root as the container's root user, an id that owns nothing here and is in no group, and
needs to traverse its lxcpath.  The directories below are closed to all but that id.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from hostruntime.errors import HostFault
from hostruntime.host import kernel
from hostruntime.host.paths import Instance

RUN_ROOT = Path("/run/orkestr")


@dataclass(frozen=True)
class RunDir:
    """The names of what is in one instance's run directory."""

    root: Path

    @classmethod
    def of(cls, instance: Instance) -> RunDir:
        """Return the run directory of an instance."""
        return cls(RUN_ROOT / str(instance.index))

    def ensure(self, proxy_gid: int) -> None:
        """Create the initial directories; idempotent.  Raises OSError.

        Each gets exactly its mode, whatever the umask is and whatever an earlier version created.
        """
        private = (self.netns, self.sysfs, self.slots, self.disks, self.volumes)
        for directory in (self.root.parent, self.root, self.lxc, self.roots):
            ensure_directory(directory, 0o711)
        for directory in private:
            ensure_directory(directory, 0o700)
        for directory in (self.egress, self.entries):
            # Set-group-id: files that root writes here belong to the proxy's group.
            ensure_directory(directory, 0o2750, proxy_gid)
        ensure_directory(self.direct, 0o700)
        self._mount_privately()
        self._mount_figures()

    def _mount_privately(self) -> None:
        # Where an earlier version's containers run, their mounts would be covered.
        if not kernel.mount_points_under(self.root):
            kernel.mount(str(self.root), self.root, None, kernel.MS_BIND)
            kernel.mount("none", self.root, None, kernel.MS_PRIVATE)

    def _mount_figures(self) -> None:
        ensure_directory(self.figures, 0o700)
        if not self.figures.is_mount():
            flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
            kernel.mount("figures", self.figures, "ramfs", flags, "mode=700")

    def remove(self) -> None:
        """Remove the directory, in which nothing may be mounted any more; idempotent.

        Raises HostFault if something is, OSError.
        """
        kernel.umount_all(self.figures)
        if mounts := [path for path in kernel.mount_points_under(self.root) if path != self.root]:
            raise HostFault(f"{mounts[0]} is still mounted; unmount it and try again.")
        kernel.umount_all(self.root)
        shutil.rmtree(self.root, ignore_errors=True)

    def ensure_disks(self) -> None:
        """Create the directory of disks and its parents; idempotent.  Raises OSError."""
        for directory in (self.root.parent, self.root):
            ensure_directory(directory, 0o711)
        ensure_directory(self.disks, 0o700)

    @property
    def roots(self) -> Path:
        """Where the roots of containers are mounted."""
        return self.root / "roots"

    @property
    def lxc(self) -> Path:
        """LXC's directory, which LXC wants a container's root to be able to enter."""
        return self.root / "lxc"

    @property
    def disks(self) -> Path:
        """Where containers' disks are mounted."""
        return self.root / "disks"

    @property
    def volumes(self) -> Path:
        """Where volumes in use are mounted."""
        return self.root / "volumes"

    @property
    def figures(self) -> Path:
        """What containers are told of their size."""
        return self.root / "figures"

    @property
    def netns(self) -> Path:
        """Bind-mounted network namespaces."""
        return self.root / "netns"

    @property
    def sysfs(self) -> Path:
        """One sysfs mount per namespace."""
        return self.root / "sysfs"

    @property
    def slots(self) -> Path:
        """Assignment records."""
        return self.root / "slots"

    @property
    def egress(self) -> Path:
        """Everything the proxy may read."""
        return self.root / "egress"

    @property
    def entries(self) -> Path:
        """One file per restricted address in use."""
        return self.egress / "entries"

    @property
    def defaults(self) -> Path:
        """The default allowlist, as JSON."""
        return self.egress / "defaults.json"

    @property
    def decisions(self) -> Path:
        """One log per owner."""
        return self.egress / "decisions"

    @property
    def direct(self) -> Path:
        """One log per owner of attempts to bypass the proxy."""
        return self.egress / "direct"


def ensure_directory(path: Path, mode: int, gid: int = 0) -> None:
    """Create a root-owned directory with exactly this mode, or set the mode of an existing one.

    Its parent must exist.  Raises OSError.
    """
    path.mkdir(mode=0o700, exist_ok=True)
    if gid:
        os.chown(path, 0, gid)
    path.chmod(mode)
