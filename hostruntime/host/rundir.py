"""What an instance keeps outside its state directory, because it dies with the kernel's state.

Network namespaces and who has them are gone after a reboot, and so is `/run`::

    /run/orkestr/                  root:root 0711
      instances/                   root:root 0700, which state directory has which number (paths.py)
      <instance>/                  root:root 0711
        roots/<container name>/    the container's root:… 0700, in 0711 (rootfs.py)
        lxc/                       0711, LXC's lxcpath; nothing is in it
        netns/<slot name>          a network namespace, bind-mounted (namespaces(7))
        sysfs/<slot name>/         the sysfs of that namespace
        disks/<owner>/             a container's writable layer, mounted
        slots/<index>.json         which owner has the slot
        seccomp-<digest>           the profile that LXC confines a container's init with
        egress/                    root:proxy 0750, what the egress proxy may read
          helper.pyz, errors/      the proxy's helper and its refusal pages
          defaults.json            the default allowlist
          entries/<address>.json   who has a restricted address, and what it may reach
          decisions/<owner>.ndjson proxy:proxy, what was asked and what was answered
          direct/<owner>.ndjson    root:root, what was asked for past the proxy

What is not said otherwise is root's, and closed to everybody else: containers' files have the ids
they have inside, so what is root's in there would otherwise be open to whoever is on this machine.
Three directories can be passed through, and not listed, as LXC (5.0.2 and 6.0) goes to a
container's root as that root, an id that owns nothing here and is in no group, and asks for
passage to its lxcpath.  What it comes to is closed to all but that id.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

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
        """Make the directories there are from the start; idempotent.  Raises OSError.

        Each has exactly its mode: whatever the umask is, and whatever an earlier version made.
        """
        closed = (self.netns, self.sysfs, self.slots, self.disks)
        for directory in (self.root.parent, self.root, self.lxc, self.roots):
            make_directory(directory, 0o711)
        for directory in closed:
            make_directory(directory, 0o700)
        for directory in (self.egress, self.entries):
            # Set-group-id: whatever root writes here belongs to the proxy's group.
            make_directory(directory, 0o2750, proxy_gid)
        make_directory(self.direct, 0o700)

    def ensure_disks(self) -> None:
        """Make the directory of disks and those above it; idempotent.  Raises OSError."""
        for directory in (self.root.parent, self.root):
            make_directory(directory, 0o711)
        make_directory(self.disks, 0o700)

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
        """One log per owner, of what went past the proxy."""
        return self.egress / "direct"


def make_directory(path: Path, mode: int, gid: int = 0) -> None:
    """Make a directory of root's with exactly this mode, or give one that is there this mode.

    Its parent must be there.  Raises OSError.
    """
    path.mkdir(mode=0o700, exist_ok=True)
    if gid:
        os.chown(path, 0, gid)
    path.chmod(mode)
