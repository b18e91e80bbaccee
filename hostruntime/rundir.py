"""What an instance keeps outside its state directory, because it dies with the kernel's state.

Network namespaces and who has them are gone after a reboot, and so is `/run`::

    /run/orkestr/<instance>/       root:root 0755
      netns/<slot name>            a network namespace, bind-mounted (namespaces(7))
      sysfs/<slot name>/           the sysfs of that namespace
      disks/<owner>/               a container's writable layer, mounted
      slots/<index>.json           which owner has the slot
      seccomp-<digest>             the profile that LXC confines a container's init with
      egress/                      root:proxy 0750, what the egress proxy may read
        helper.pyz, errors/        the proxy's helper and its refusal pages
        defaults.json              the default allowlist
        entries/<address>.json     who has a restricted address, and what it may reach
        decisions/<owner>.ndjson   proxy:proxy, what was asked and what was answered
        direct/<owner>.ndjson      root:root, what was asked for past the proxy
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hostruntime.paths import Instance

RUN_ROOT = Path("/run/orkestr")


@dataclass(frozen=True)
class RunDir:
    """The names of what is in one instance's run directory."""

    root: Path

    @classmethod
    def of(cls, instance: Instance) -> RunDir:
        """Return the run directory of an instance."""
        return cls(RUN_ROOT / str(instance.index))

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
